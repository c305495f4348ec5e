"""The kernels and the torch references they must equal.

reference/          what every kernel computes, in plain torch; the noise that makes samples independent of schedules
layout.py           the tables by which queries find their keys
pack.py             a step's forest onto the device: new slots into the table of paths, and the tables of queries
store.py            keys and values into their slots
tree_attention.py   every query over its path and its ancestors in the draft tree
verify.py           from logits to accepted paths, all threads in one launch
scores.py           what a program leaves of a chunk of a row's logits, and how chunks are merged
accept.py           which of a thread's draft nodes are accepted
draft.py            what Medusa heads propose: the two below, one behind the other
residual_blocks.py  residual blocks of all heads
top_logits.py       the likeliest tokens of an unembedding without writing logits
tiles.py            tiles of the last two's products
aot.py              compiles every variant without a GPU, and holds what it costs against a table
resources.json      that table
"""
