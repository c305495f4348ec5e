"""Pictures of an answer and its threads: in notebooks, as HTML for anywhere else, and in a terminal.

    output = apar.generate(**inputs, return_dict_in_generate=True)     # a notebook shows it as `answer(output)`
    output = apar.generate(**inputs, events=LiveView(apar.tokenizer))  # threads side by side while they grow

Everything is drawn from events (`medusa_apar.events`), so a picture of any step can be had afterwards. The HTML is
self-contained, needs no JavaScript, takes text and background from the page around it, and says nothing by
colour alone. Without a tokenizer tokens are shown by number.

    answer_picture.py    `answer`: the text, each thread's part a lane within it
    tree_picture.py      `tree`: the paragraph tree
    lanes_picture.py     `lanes`: threads side by side at one step
    forest_picture.py    `forest`: the rows of one step, and what each of them sees
    timeline_picture.py  `timeline`: threads and slots over the steps
    live.py              `LiveView`: the lanes in a notebook while the answer grows
    terminal.py          the same in a terminal
    picture.py           `Picture`: a piece of HTML that notebooks show
    style.css            the style that all pictures share
    guesses.py           draft trees as lines of text
    pieces.py            what each token adds to the text
    names.py             what pictures call things, and how they tell threads apart
"""

from .answer_picture import answer as answer
from .forest_picture import forest as forest
from .lanes_picture import lanes as lanes
from .live import LiveView as LiveView
from .picture import Picture as Picture
from .timeline_picture import timeline as timeline
from .tree_picture import tree as tree
