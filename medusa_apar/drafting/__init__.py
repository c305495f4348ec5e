"""What is guessed ahead of each thread, and which guesses become draft nodes.

draft_tree.py   the shape of a draft tree, and the best one for a table of acceptance
candidates.py   what could hang below a thread's root, with a probability for each node
ngram_index.py  what a request has said before: prompt lookup over all its threads
recycling.py    what the model has said behind a request's tokens: token recycling
recycled_candidates.py  that among the candidates, with a probability for each node
budget.py       which candidates become nodes: one budget for the whole forest
step_cost.py    what a step costs by its rows, and so how many nodes pay
drafter.py      the protocols of draft heads, and of what drafts with them
speculator.py   owns all of this and what it learns: candidates, learn, draft
advance.py      what a step has brought a thread
options.py      `Speculation`: which parts of all this take part
"""
