"""Random paragraph trees: reading order, positions and ends, by the definition of reading order."""

from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.threads.paragraph_tree import ParagraphTree, ReadingCursor
from tests.support.random_requests import CHILD, EOS, Script


def slow_reading_order(tree: ParagraphTree, thread=None) -> list[int]:
    """The definition: a thread's tokens, each child's text spliced in at its `[Fork]`."""
    thread = thread or tree.trunk
    text = []
    children = {child.fork_index: child for child in thread.children}
    for index in range(thread.num_forced, len(thread.tokens)):
        token = thread.tokens[index]
        if index in children:
            text += slow_reading_order(tree, children[index])
        elif not (token == EOS and thread.parent is not None):
            text.append(token)
    return text


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_reading_order_positions_and_ends(data):
    cursors: dict[ParagraphTree, ReadingCursor] = {}
    shown: dict[ParagraphTree, list[int]] = {}

    def after_step(forest, trees):
        for tree in trees:
            cursor = cursors.setdefault(tree, ReadingCursor(tree))
            shown.setdefault(tree, []).extend(thread.tokens[index] for thread, index in cursor.advance())
            # What was shown never has to be taken back.
            assert slow_reading_order(tree)[: len(shown[tree])] == shown[tree]
            for thread, before in tree.live_in_reading_order():
                written = list(tree.reading_order())
                own = [number for number, (owner, _) in enumerate(written) if owner is thread]
                if own:
                    # Its end stands right behind its last visible token and everything spliced in before that.
                    assert before >= own[-1] + 1
                assert 0 <= before <= len(written)

    for tree in Script(data).run(after_step):
        assert [thread.tokens[index] for thread, index in tree.reading_order()] == slow_reading_order(tree)
        for thread in tree.threads[1:]:
            assert thread.start == thread.parent.start + thread.fork_index + 1
            assert len(thread.ancestor_ids()) == thread.start
            assert thread.path_ids == [
                *thread.parent.ancestor_ids(),
                *thread.parent.tokens[: thread.fork_index + 1],
                CHILD,
            ]
        total = len(slow_reading_order(tree))
        live = tree.live_in_reading_order()
        assert [before for _, before in live] == sorted(before for _, before in live)
        if live and live[-1][0] is tree.trunk:
            assert live[-1][1] == total
