"""EAGLE-3 drafters (arXiv 2503.01840): one decoder layer that attends to what was written, over the base's states.

files.py    checkpoints as they are found in the wild, read into one normal form by their tensors
writing.py  the same the other way: its authors' layout and speculators'
convert.py  `medusa-apar convert` of a drafter, for other engines
heads.py    the drafter as draft heads of a model: loading, saving, what it has of the model
drafter.py  drafting, level by level
fresh.py    a drafter to begin training with: the base's own last layer
layer.py    the drafter's network; whoever runs it brings the attention over the keys and values that it keeps
train.py    `medusa-apar train-heads --kind eagle3`
states.py   what the base puts out along these texts, kept while there is room
losses.py   what a drafter is trained on: it drafts several tokens from every place of an answer at once
"""
