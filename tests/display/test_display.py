"""Pictures show what happened: their text is the answer, their mask the forest's, and their HTML stands by itself."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import medusa_apar
from medusa_apar import display
from medusa_apar.display.forest_picture import blocks, mask, rows
from medusa_apar.display.guesses import chains
from medusa_apar.display.pieces import Pieces
from medusa_apar.events import StepStarted
from medusa_apar.events.recording import Recording
from medusa_apar.forest.forest import Forest
from medusa_apar.threads.paragraph_tree import ParagraphTree
from tests.support.calls import CALLS, SAMPLED, fork_freely
from tests.support.list_writer import list_prompts, list_writer
from tests.support.models import CONTROL, forking_model
from tests.support.prompts import prompts
from tests.support.tokenizers import ListTokenizer, tiny_tokenizer

CONTROL_IDS = (CONTROL.fork_id, CONTROL.child_id)


@pytest.fixture(scope="module")
def forked():
    """Two rows."""
    return fork_freely()


@pytest.fixture(scope="module")
def listed():
    apar = medusa_apar.attach(list_writer(), tokenizer=ListTokenizer(), speculation="forest", budget=24)
    return apar.generate(**list_prompts(1), max_new_tokens=64, fork="lists", return_dict_in_generate=True, **SAMPLED)


class Outline(HTMLParser):
    """Fails on elements that are not closed in order; keeps what is read."""

    VOID = {"br", "meta"}

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.attributes = [], {}, []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs)))

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, attributes in self.open:
            for css in (attributes.get("class") or "").split():
                self.text[css] = self.text.get(css, "") + data


def pictures(out):
    step = out.recording.step
    yield from (display.answer(out), display.timeline(out), display.timeline(out, sequential=True), display.tree(out))
    for at in (1, step // 2, step):
        yield from (display.lanes(out, at), display.lanes(out, at, checking=True), display.forest(out, at))


def test_html_is_well_formed_and_stands_by_itself(forked, listed):
    for out in (forked, listed):
        for picture in pictures(out):
            outline = Outline(picture.page())
            assert "<script" not in picture.html and "@import" not in picture.html
            assert not [value for name, value in outline.attributes if name in ("src", "href")]
            assert "http" not in re.sub(r"<text[^>]*>|<svg[^>]*>", "", picture.html)
            assert not [name for name, _ in outline.attributes if name.startswith("on")]
            assert picture._repr_html_() == picture.html and repr(picture)


def squeezed(text):
    return "".join(text.split())


@pytest.mark.parametrize("call", ["control tokens", "cut short", "lists", "a single token"])
def test_the_answer_is_the_text(call):
    out = CALLS[call]()
    tokenizer = ListTokenizer() if call == "lists" else tiny_tokenizer()
    picture = display.answer(out, tokenizer)
    shown = Outline(picture.html).text
    expected = ""
    for row in range(len(out.recording.trees)):
        ids = [thread.tokens[index] for thread, index in out.recording.text(row)]
        expected += tokenizer.decode(ids, skip_special_tokens=True)
        assert squeezed(tokenizer.decode(ids, skip_special_tokens=True)) in squeezed(picture.text)
    assert squeezed(shown["ma-t"]) == squeezed(expected)
    threads = sum(1 for tree in out.recording.trees for thread in tree.threads[1:])
    labels = len(re.findall(r'class="ma-label"', picture.html))
    assert labels <= threads and (labels > 1 or call == "a single token")


def test_every_token_tells_its_step(forked):
    html = display.answer(forked, tiny_tokenizer()).html
    told = {int(step) for step in re.findall(r'title="step (\d+), ', html)}
    came = {
        forked.recording.origins[thread][index - thread.num_forced].step
        for row in (0, 1)
        for thread, index in forked.recording.text(row)
    }
    assert told == came and len(told) > 5
    assert "guessed by the heads" in html and "ma-ngrams" in html


def test_an_output_shows_itself(listed):
    assert listed._repr_html_() == display.answer(listed).html
    assert listed.tokenizer is not None and "tokenizer" not in listed


def test_without_a_tokenizer_tokens_have_numbers(forked):
    thread, index = forked.recording.text(0)[0]
    assert f"⟨{thread.tokens[index]}⟩" in display.answer(forked).html


def test_an_output_without_events_shows_nothing():
    out = fork_freely()
    out.events = None
    assert out._repr_html_() is None
    with pytest.raises(ValueError, match="no events"):
        display.answer(out)


def test_text_is_escaped():
    class Hostile(ListTokenizer):
        def decode(self, ids, **options):
            return "".join(f"<b>&{index}" for index in ids)

    out = fork_freely(generate={"max_new_tokens": 12})
    for picture in (
        display.answer(out, Hostile()),
        display.tree(out, tokenizer=Hostile()),
        display.lanes(out, 3, checking=True, tokenizer=Hostile()),
        display.forest(out, 3, tokenizer=Hostile()),
    ):
        assert "<b>&" not in picture.html and "&lt;b&gt;&amp;" in picture.html
        Outline(picture.html)


def test_lanes_mark_guesses_by_more_than_colour(forked):
    """A step's drafts are grey italics while they are checked, then bold and underlined, or struck."""
    tokenizer, recording = tiny_tokenizer(), forked.recording
    seen = set()
    for step in range(2, recording.step + 1):
        before, after = recording.at(step, checking=True), recording.at(step)
        html = display.lanes(forked, step, tokenizer=tokenizer).html
        for thread in after.trees[0].threads:
            event = after.accepted.get(thread)
            if event and any(token not in CONTROL_IDS for token in event.token_ids[: len(event.nodes)]):
                seen.add("hit")
                assert '<strong class="ma-new ma-hit">' in html
            if thread in after.rejected:
                seen.add("miss")
                assert '<s class="ma-miss">' in html
        if any(before.rows[drafted.request] == 0 and "heads" in drafted.sources for drafted in before.drafted.values()):
            assert '<em class="ma-guess">' in display.lanes(forked, step, checking=True, tokenizer=tokenizer).html
        assert '<em class="ma-guess">' not in html
    assert seen == {"hit", "miss"}


def test_steps_out_of_range_are_refused(forked):
    last = forked.recording.step
    for step in (0, last + 1):
        with pytest.raises(ValueError, match=f"must be from 1 to {last}"):
            display.forest(forked, step)
    for step in (-1, last + 1):
        with pytest.raises(ValueError, match=f"must be from 0 to {last}"):
            display.lanes(forked, step)


@pytest.mark.parametrize(
    "call", ["control tokens", "few threads at once", "under memory pressure", "one after the other", "lists"]
)
def test_the_forest_has_the_mask_that_the_model_was_given(call, monkeypatch):
    """Row by row and column by column, over all steps: drawn from events, and as the forest made it of slots."""
    given_masks, init = [], Forest.__init__

    def keep(forest, requests, ledger, device):
        init(forest, requests, ledger, device)
        given_masks.append({})
        for segments in requests:
            visible = np.zeros((sum(segment.size for segment in segments), ledger.pool.capacity), dtype=bool)
            first = segments[0].row
            for segment in segments:
                segment.fill_visible(visible[segment.row - first : segment.row - first + segment.size])
            own = np.concatenate([segment.slots for segment in segments])
            positions = np.concatenate([segment.positions for segment in segments])
            name = None if segments[0].request is None else segments[0].request.id
            given_masks[-1][name] = visible.sum(axis=1), visible[:, own], positions

    monkeypatch.setattr(Forest, "__init__", keep)
    monkeypatch.setattr("medusa_apar.engine.admission.check_fits", lambda *_: None)
    out = CALLS[call]()
    recording = out.recording
    # Behind what ran before the call whose output this is.
    for step, masks in enumerate(given_masks[-recording.step :], 1):
        then = recording.at(step, checking=True)
        assert masks.keys() == {drafted.request for drafted in then.drafted.values()}
        for name, (seen, among, positions) in masks.items():
            shown, columns = rows(then, then.rows[name]), blocks(then, then.rows[name])
            ours = mask(shown, columns)
            sizes = np.array([block.stop - block.first for block in columns] + [1] * len(shown))
            assert np.array_equal(ours[:, len(columns) :], among)
            assert np.array_equal((ours * sizes).sum(axis=1), seen)
            assert [row.position for row in shown] == positions.tolist()
    assert step == recording.step


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_chains_hold_every_node_once(data):
    parents = [data.draw(st.integers(-1, node - 1)) for node in range(data.draw(st.integers(0, 12)))]
    nodes = {node for node in range(len(parents)) if data.draw(st.booleans())}
    found = chains(parents, nodes)
    assert sorted(node for _, chain in found for node in chain) == sorted(nodes)
    for above, chain in found:
        assert [parents[node] for node in chain] == [above, *chain[:-1]]


class Bytes:
    """A tokenizer of bytes that, like SentencePiece, drops a leading space."""

    def decode(self, ids, **options):
        return bytes(ids).decode("utf-8", errors="replace").removeprefix(" ")


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=20), st.text(max_size=20), st.lists(st.integers(1, 9), max_size=30))
def test_pieces_add_up_to_the_text(prompt, text, growth):
    """However a thread grows, and where characters take several tokens."""
    tree = ParagraphTree(list(f"a{prompt}".encode()))
    pieces, ids = Pieces(Bytes()), list(text.encode())
    for count in [*growth, len(ids)]:
        tree.trunk.tokens += ids[len(tree.trunk.token_ids) :][:count]
        pieces.of(tree.trunk)
    assert "".join(pieces.of(tree.trunk)) == text
    assert len(pieces.of(tree.trunk)) == len(ids)
    fresh = Pieces(Bytes())
    assert "".join(fresh.at(tree.trunk, 0, ids)) == text


def test_a_live_view_needs_a_notebook():
    with pytest.raises(RuntimeError, match="in a notebook"):
        display.LiveView(tiny_tokenizer())


class Handle:
    """What IPython gives for an output."""

    def __init__(self):
        self.frames = []

    def update(self, picture):
        self.frames.append(picture._repr_html_())


def test_a_live_view_draws_each_step_twice_and_ends_with_the_answer(monkeypatch):
    handle, slept = Handle(), []
    monkeypatch.setattr("medusa_apar.display.live._new_output", lambda: handle)
    monkeypatch.setattr("medusa_apar.display.live.time.sleep", slept.append)
    apar = medusa_apar.attach(
        forking_model(5), None, CONTROL, speculation="forest", budget=20, tokenizer=tiny_tokenizer()
    )
    view = display.LiveView(apar.tokenizer, step_seconds=0.5)
    options = {**prompts(1, 6), "max_new_tokens": 30, "do_sample": False}
    out = apar.generate(**options, events=view, return_dict_in_generate=True)
    steps = out.stats.steps
    assert len(handle.frames) == 2 * steps and slept == [0.25] * (2 * steps - 1)
    assert "being checked" in handle.frames[-2] and "being checked" not in handle.frames[-1]
    assert view.recording.events == out.events
    for frame in handle.frames:
        Outline(frame)
    checking = sum(isinstance(event, StepStarted) for event in out.events)
    assert sum("being checked" in frame for frame in handle.frames) == checking


def test_a_live_view_does_not_hold_up_the_decoding(monkeypatch):
    """Without a pace it draws some frames, and the last."""
    handle = Handle()
    monkeypatch.setattr("medusa_apar.display.live._new_output", lambda: handle)
    monkeypatch.setattr("medusa_apar.display.live.FRAME_SECONDS", 1e9)
    view = display.LiveView(None)
    apar = medusa_apar.attach(forking_model(5), None, CONTROL)
    apar.generate(**prompts(1, 6), max_new_tokens=30, do_sample=False, events=view)
    assert len(handle.frames) == 2  # the first, since none was drawn before it, and the last
    assert "0 writing" in handle.frames[-1]


def test_nothing_can_be_drawn_of_nothing():
    assert Recording().step == 0
    with pytest.raises(ValueError, match="must be from 1 to 0"):
        display.forest(Recording(), 1)
