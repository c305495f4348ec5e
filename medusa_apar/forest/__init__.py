"""All draft trees of a step as one row of tokens: the only place that knows threads and slots both.

forest.py         the rows, their slots and positions
mask.py           which slots each row may attend to, as a dense mask
device_tables.py  the same for the kernels, as tables on the device
"""
