"""Where models come from, and what they are.

sources.py       what a model's name stands for, and reading what lies there
hub.py           the embedded default model, fetched once into the cache folder
families.py      what differs between families of models, and which are refused
chat.py          from a conversation to a prompt
head_files.py    the names of head files, and the config beside them
base_model.py    the model that heads sit on, read as far as a conversion needs it
merge.py         an adapter merged into its base
model_folder.py  a model folder that is written whole or not at all
fingerprint.py   names for what files are made from
"""
