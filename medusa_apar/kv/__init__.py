"""The KV cache: a slot for each token, found by its path, never copied or moved.

pool.py          the slots and their keys and values, handed out and taken back one by one
slot_runs.py     which free slots a request gets, so that its own lie side by side
slot_ledger.py   which slot holds which token, and for how long
prefix_cache.py  paths that are kept for later requests, a tree over tokens
path_table.py    the slots along every live path, in a table on the device
"""
