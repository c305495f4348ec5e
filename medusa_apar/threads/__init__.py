"""A request's threads as lists of token ids: where they fork, and in which order they are read. No tensors.

paragraph_tree.py  threads, their forks, their paths and their reading order
request.py         one prompt and everything generated for it
control_tokens.py  the ids of `[Fork]` and `[Child]`
fork_rule.py       where these may be chosen
fork_manager.py    appends what a thread has chosen, spawns children, ends threads
fork_policy.py     where an answer forks: at `[Fork]`, at list items, or nowhere
list_items.py      list items as they are being written
"""
