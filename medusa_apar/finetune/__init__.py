"""Teaching a chat model to fork: paragraph trees by rule, trie packing, LoRA training.

- corpus.py: chat JSONL -> paragraph tree of the last answer
- packing.py: threads -> one row in which every token appears once
- mixture.py: which examples are trained on, and how rows fill updates
- adapter.py: LoRA plus the two control rows: attach, forward, save
- train.py: the training loop and its command line
"""
