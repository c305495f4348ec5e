"""The kernels and the torch references they must equal.

reference   what every kernel computes, in plain torch; the counter-based noise that makes samples independent of the
            schedule
pack        a step's forest onto the device: new slots into the table of paths, and the tables of queries
verify      from logits to accepted paths, all threads in one launch
draft       residual heads, and the likeliest tokens without writing logits
aot         compiles every variant without a GPU, and holds its registers and shared memory against a table
"""
