"""Runs steps for requests: plan, forward, verify, commit, draft.

engine.py        the loop
scheduler.py     which threads run in a step, and with how many draft nodes
fork_manager.py  accepts tokens, spawns threads, ends them and gives their slots back
rescoring.py     a finished answer held against plain decoding, weak threads written anew
draft_watch.py   says once where heads guess no better than chance
stats.py         what a call counted and measured
"""
