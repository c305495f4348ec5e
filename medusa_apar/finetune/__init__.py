"""Teaching a chat model to fork: paragraph trees by rule, trie packing, LoRA training.

rules.py    an answer's text into its paragraph tree
corpus.py   chat files into examples, with what was left out and why
data.py     `medusa-apar data`: examples.jsonl and a report
packing.py  threads into one row in which every token appears once
repeats.py  an answer that loops into what is trained against
forms.py    details forked, in line, or some of each
mixture.py  which examples are trained on, and how rows fill updates
base.py     the model to be tuned and its two control tokens
adapter.py  LoRA plus the two control rows: attach, forward, save
lora_linear.py  LoRA's products in the dtype of the frozen weights
distil.py   what the untuned base would have written, where it knows better than a corpus
settings.py  what a run is, and its learning rate
tally.py    means of losses, over rows and processes
train.py    `medusa-apar finetune`: the training loop
"""
