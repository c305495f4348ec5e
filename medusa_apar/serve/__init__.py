"""The OpenAI-compatible server, and the page on which threads can be watched: a shell over an engine.

    page.py          the page's files over HTTP
    event_texts.py   events as a stream carries them, with every token's text
"""
