"""Pictures of an answer and its threads: in notebooks, as HTML for anywhere else, and in a terminal.

    output = apar.generate(**inputs, return_dict_in_generate=True)     # a notebook shows it as `answer(output)`
    output = apar.generate(**inputs, events=LiveView(apar.tokenizer))  # threads side by side while they grow

Everything is drawn from events (`medusa_apar.events`), so a picture of any step can be had afterwards. The HTML is
self-contained, needs no JavaScript, takes text and background from the page around it, and says nothing by
colour alone.
Without a tokenizer tokens are shown by number.
"""

from .answer_picture import answer as answer
from .forest_picture import forest as forest
from .lanes_picture import lanes as lanes
from .live import LiveView as LiveView
from .picture import Picture as Picture
from .timeline_picture import timeline as timeline
from .tree_picture import tree as tree
