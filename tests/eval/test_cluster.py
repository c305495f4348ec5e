"""The simulated cluster counts what one can count by hand, keeps what engines promise, and agrees with vLLM."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa_apar.eval import cluster, cluster_front
from medusa_apar.eval.cluster_answers import AFFINITIES, Setting, simulate
from medusa_apar.eval.cluster_engine import Blocks, EngineLimits, Sequence, SimulatedEngine
from medusa_apar.eval.cluster_trees import EOS, FORK, TEXT, RecordedAnswer, RecordedThread, Script, read, text_of
from medusa_apar.eval.cluster_trees import record as recorded_by
from tests.support.bytes_writer import bytes_writer, ids_of

TRUNK = RecordedThread(-1, -1, 10, True)
PLAIN = (RecordedThread(-1, -1, 14, True),)
# A [Fork] is the trunk's 4th token; the child writes 6. Shown: 9 of the trunk, 5 of the child.
TINY = RecordedAnswer("tiny", 5, (TRUNK, RecordedThread(0, 3, 6, True)), PLAIN)
ONE = Setting(threads=True, answers=1, limits=EngineLimits(block_size=4))
PROTOTYPE = cluster.TREES.with_name("prototype.json")


@st.composite
def answers(draw):
    """Trees of up to six threads."""
    own = st.integers(2, 40)
    threads = [RecordedThread(-1, -1, draw(own), draw(st.booleans()))]
    places = [(0, place) for place in range(threads[0].length - 1)]
    for _ in range(draw(st.integers(0, 5))):
        if not places:
            break
        fork = draw(st.sampled_from(places))
        places.remove(fork)
        threads.append(RecordedThread(*fork, draw(own), draw(st.booleans())))
        places += [(len(threads) - 1, place) for place in range(threads[-1].length - 1)]
    return RecordedAnswer("any", draw(st.integers(1, 30)), tuple(threads), (threads[0]._replace(length=draw(own)),))


# ---- by hand


def test_one_thread_takes_a_step_a_token():
    found = simulate([TINY], replace(ONE, threads=False))
    assert (found.shown, found.written, found.steps, found.latency, found.rows) == (14, 14, 14, 14, 1)
    assert found.forks == found.round_trips == 0 and found.unknown == 0
    assert found.most_kv == 20  # a prompt of 5 and 14 tokens, the last of which is never fed: 18, in blocks of 4


def test_a_child_starts_a_step_after_the_next():
    found = simulate([TINY], ONE)
    # The fork is written in step 4, the child runs from step 6 to 11, the trunk ends in step 10.
    assert (found.shown, found.written, found.steps, found.latency) == (14, 16, 11, 11)
    assert found.fork_wait == 2 and found.forks == found.round_trips == 1
    # Path: 5 of the prompt, 4 of the trunk, [Child]. Two blocks of 4 are whole and there.
    assert (found.path, found.recomputed) == (10, 2)


@pytest.mark.parametrize("lag", [0, 2, 5])
def test_every_step_of_lag_costs_a_step(lag):
    found = simulate([TINY], replace(ONE, lag=lag))
    assert found.fork_wait == 1 + lag and found.steps == max(10, 4 + lag + 6)


def test_what_stands_beyond_the_limit_is_cancelled_and_was_written_in_vain():
    found = simulate([TINY], replace(ONE, max_new_tokens=5))
    # 3 of the trunk, then 2 of the child, which come in the steps 6 and 7. From step 6 on the trunk stands beyond the
    # limit; it writes its seventh token before it is told.
    assert (found.shown, found.latency, found.written) == (5, 7, 7 + 2)


def test_a_prompt_goes_in_pieces():
    limits = EngineLimits(block_size=4, max_num_batched_tokens=2)
    found = simulate([TINY], replace(ONE, threads=False, limits=limits))
    assert found.steps == 2 + 14  # 2, 2 and 1 tokens of the prompt, whose last piece writes the first token


def test_answers_wait_for_a_place_of_an_engine():
    limits = EngineLimits(block_size=4, max_num_seqs=1)
    found = simulate([TINY], replace(ONE, threads=False, in_flight=3, answers=3, limits=limits))
    assert found.steps == 3 * 14 and found.latency == 14 * (1 + 2 + 3) / 3


def test_replicas_share_answers():
    two = replace(ONE, threads=False, in_flight=2, answers=2, replicas=2)
    assert simulate([TINY], two).rows == 1 and simulate([TINY], replace(two, replicas=1)).rows == 2


def test_the_latest_starts_anew_where_blocks_are_too_few():
    def sequence(own):
        return Sequence((0, own), 4, [], own * 100)

    engine = SimulatedEngine(EngineLimits(block_size=4, kv_blocks=3))
    first, second = sequence(1), sequence(2)
    engine.add(first)
    engine.add(second)
    assert engine.step() == [first, second]  # one block each, whole
    assert engine.step() == [first]  # the last free one is the first's, the second goes
    assert engine.preemptions == 1 and not second.running and second.computed == 0
    assert [engine.step() for _ in range(3)] == [[first]] * 3  # two blocks are held, and two would be needed
    engine.remove(first)
    assert engine.step() == [second] and second.tokens == 6  # it has found its first block again
    engine.remove(second)
    assert not engine.busy and engine.step() == []


def test_a_block_goes_when_nobody_holds_it_and_another_is_needed():
    blocks = Blocks(2)
    held = blocks.allocate(2)
    held = [blocks.publish(7), blocks.publish(8)]
    assert blocks.used == 2 and not blocks.fits(1) and blocks.publish(7) is None
    blocks.release(held)
    assert blocks.used == 0 and blocks.fits(2) and not blocks.fits(2, [7])
    blocks.allocate(1)
    other = Sequence((0, 0), 9, [7, 8], 0)
    assert blocks.hits(other, 2) == [7]  # the end of a path went first


# ---- whatever the trees


@settings(max_examples=60, deadline=None)
@given(st.lists(answers(), min_size=1, max_size=3), st.data())
def test_every_answer_ends_with_what_one_alone_shows(recorded, data):
    choose = data.draw
    limits = EngineLimits(
        block_size=choose(st.sampled_from([1, 4, 16])),
        max_num_seqs=choose(st.integers(1, 6)),
        max_num_batched_tokens=choose(st.integers(1, 50)),
        priority=choose(st.booleans()),
    )
    setting = Setting(
        threads=True,
        in_flight=choose(st.integers(1, 6)),
        answers=choose(st.integers(1, 6)),
        max_new_tokens=choose(st.integers(1, 60)),
        replicas=choose(st.integers(1, 3)),
        affinity=choose(st.sampled_from(AFFINITIES)),
        lag=choose(st.integers(0, 3)),
        transfer=choose(st.none() | st.integers(0, 3)),
        free_rows=choose(st.none() | st.floats(0.5, 20)),
        spread=choose(st.integers(0, 10)),
        limits=limits,
    )
    longest = 30 + 2 * setting.max_new_tokens + 2 * 3 + 1 + setting.lag
    few = -(-longest // limits.block_size) + 1 + choose(st.integers(0, 10))
    alone = simulate(recorded, Setting(threads=True, answers=setting.answers, max_new_tokens=setting.max_new_tokens))
    for blocks in (None, few):
        found = simulate(recorded, replace(setting, limits=replace(limits, kv_blocks=blocks)))
        assert found.shown == alone.shown <= setting.answers * setting.max_new_tokens
        assert found.written >= found.shown and found.rows <= limits.max_num_seqs >= found.most_rows
        assert found.forwarded <= limits.max_num_batched_tokens
        assert blocks is None or found.most_kv <= blocks * limits.block_size
        assert found.recomputed <= found.path


@settings(max_examples=30, deadline=None)
@given(st.lists(answers(), min_size=1, max_size=3), st.integers(1, 4), st.integers(1, 60))
def test_one_thread_an_answer_wastes_nothing(recorded, in_flight, limit):
    setting = Setting(threads=False, in_flight=in_flight, answers=6, max_new_tokens=limit)
    found, alone = simulate(recorded, setting), simulate(recorded, replace(setting, in_flight=1))
    assert found.written == found.shown == alone.steps == alone.written >= found.steps


@settings(max_examples=20, deadline=None)
@given(answers(), st.sampled_from([4, 16]))
def test_a_fork_computes_less_than_a_block_and_all_of_it_where_threads_are_strewn(recorded, size):
    near = Setting(threads=True, answers=2, max_new_tokens=250, replicas=2, limits=EngineLimits(block_size=size))
    kept, strewn = simulate([recorded], near), simulate([recorded], replace(near, affinity="none"))
    assert kept.recomputed <= size and kept.recomputed <= strewn.recomputed <= strewn.path == kept.path


def test_strewn_threads_compute_their_whole_path():
    tall = replace(TINY, prompt=50)
    strewn = simulate([tall], replace(ONE, affinity="none", replicas=2))
    assert strewn.recomputed == strewn.path == 55


def test_prefill_elsewhere_takes_longer_and_knows_no_answer():
    tall = replace(TINY, prompt=50)
    apart = simulate([tall], replace(ONE, transfer=3))
    assert apart.fork_wait == 2 + 1 + 3
    assert apart.recomputed == 55 - 48  # the prompt's whole blocks alone were computed there
    assert simulate([tall], ONE).recomputed == 55 - 52


def test_a_trunk_that_is_far_ahead_waits():
    """Its 60 tokens behind the fork are not read within the limit, where its child writes 50."""
    threads = (RecordedThread(-1, -1, 70, True), RecordedThread(0, 3, 50, True))
    tree = RecordedAnswer("ahead", 5, threads, PLAIN)
    many = Setting(threads=True, in_flight=16, answers=64, max_new_tokens=40)
    free, capped = simulate([tree], many), simulate([tree], replace(many, free_rows=4.0))
    assert capped.per_100 < free.per_100 and capped.shown == free.shown
    assert capped.latency <= free.latency + 2


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="3 blocks of 4 tokens are too few: a path may have"):
        simulate([TINY], replace(ONE, limits=EngineLimits(block_size=4, kv_blocks=3)))
    with pytest.raises(ValueError, match="affinity is 'near'"):
        replace(ONE, affinity="near")
    with pytest.raises(ValueError, match="in_flight is 0"):
        replace(ONE, in_flight=0)


# ---- recorded trees


def test_a_script_says_what_each_token_is():
    script = Script(TINY.forked)
    assert list(script.tokens[0]) == [TEXT] * 3 + [FORK] + [TEXT] * 5 + [EOS]
    assert script.children == {(0, 3): 1} and script.tokens[1][-1] == EOS


@given(st.lists(answers(), min_size=1, max_size=3))
@settings(max_examples=20, deadline=None)
def test_trees_are_read_as_they_were_written(tmp_path_factory, recorded):
    path = tmp_path_factory.mktemp("trees") / "trees.json"
    path.write_text(text_of(recorded, {"model": "any"}))
    assert read(path) == recorded


@pytest.mark.parametrize(
    "entry, why",
    [
        ({"id": "1", "prompt": 3, "forked": [[-1, -1, 4, True]]}, "it lacks 'plain'"),
        ({"id": "1", "prompt": 0, "forked": [], "plain": []}, "no number of tokens"),
        ({"id": "1", "prompt": 3, "forked": [], "plain": [[-1, -1, 4, True]]}, "no trunk"),
        ({"id": "1", "prompt": 3, "forked": [[-1, -1, "4", True]], "plain": [[-1, -1, 4, True]]}, "thread 0 is not"),
        ({"id": "1", "prompt": 3, "forked": [[-1, -1, 4, True], [0, 3, 4, True]], "plain": []}, "wrote nothing"),
    ],
)
def test_a_file_that_holds_no_trees_is_refused(tmp_path, entry, why):
    path = tmp_path / "trees.json"
    path.write_text(json.dumps({"answers": [entry]}))
    with pytest.raises(ValueError, match=f"answer 1 is no recorded one .*{why}"):
        read(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds no recorded answers"):
        read(path)


def test_the_native_engine_is_recorded():
    apar, asked = bytes_writer(3), [(text, ids_of(text)) for text in ("aé?", "你 a", "😀\n é")]
    found = recorded_by(apar, asked, 24)
    assert [its.prompt for its in found] == [len(ids) for _, ids in asked]
    assert any(len(its.forked) > 1 for its in found)
    for answer, (_, ids) in zip(found, asked, strict=True):
        assert len(answer.plain) == 1
        for threads, fork in ((answer.forked, "auto"), (answer.plain, "off")):
            request = apar.request("again", ids, max_new_tokens=24, fork=fork)
            with apar.engine() as engine:
                engine.add(request)
                while engine.unfinished:
                    engine.step()
            trunk = [token == request.tree.fork_id for token in request.tree.trunk.token_ids]
            both = zip(trunk, Script(threads).tokens[0], strict=False)  # where it is cancelled is a matter of timing
            assert all(forks == (token == FORK) for forks, token in both)
            shown = simulate([answer], Setting(threads=fork == "auto", answers=1, max_new_tokens=24)).shown
            assert shown == len(request.text_ids)


def test_the_command_records_every_so_many_questions(tmp_path, monkeypatch):
    monkeypatch.setattr("medusa_apar.loading.load", lambda *_, **__: bytes_writer(3))
    words, out = tmp_path / "prompts.jsonl", tmp_path / "trees.json"
    words.write_text("".join(json.dumps({"id": n, "prompt": "aé你"[n]}) + "\n" for n in range(3)))
    options = ["--prompts", str(words), "--every", "2", "--recorded-tokens", "12"]
    assert cluster.main(["--record", str(out), *options]) == 0
    assert [its.id for its in read(out)] == ["0", "2"]
    assert json.loads(out.read_text())["about"]["tokens"] == 12


# ---- the command, and vLLM


@pytest.fixture
def trees(tmp_path):
    path = tmp_path / "trees.json"
    path.write_text(text_of([TINY, replace(TINY, id="tall", prompt=50)], {}))
    return path


def test_the_command_tells_every_setting(trees, tmp_path, capsys):
    out = tmp_path / "found.json"
    options = ["--in-flight", "1", "3", "--replicas", "1", "2", "--max-new-tokens", "8", "--out", str(out)]
    assert cluster.main(["--trees", str(trees), *options]) == 0
    found = json.loads(out.read_text())["found"]
    asked = [(its["setting"]["in_flight"], its["setting"]["replicas"]) for its in found]
    assert asked == [(1, 1), (1, 2), (3, 1), (3, 2)]
    lines = capsys.readouterr().out.splitlines()
    for its, line in zip(found, lines[1:], strict=False):
        assert re.sub("/ +", "/", line).split()[2] == f"{its['plain']['steps']}/{its['threads']['steps']}"
        assert its["plain"]["shown"] == its["threads"]["shown"] == 8 * its["setting"]["answers"]


def test_our_orchestrator_shows_what_the_simulation_says(trees, capsys):
    assert cluster_front.main(["--trees", str(trees), "--in-flight", "1", "5", "--max-new-tokens", "8"]) == 0
    found = re.findall(r"(\d+) in flight, (\w+).*: (\d+) tokens shown of (\d+)", capsys.readouterr().out)
    assert [its[:3] for its in found] == [
        *(("1", "one", "16"), ("1", "threads", "16"), ("5", "one", "40"), ("5", "threads", "40"))
    ]
    assert all(int(written) == 8 * max(int(answers), 2) for answers, kind, _, written in found if kind == "one")
    assert all(int(written) > int(shown) for _, kind, shown, written in found if kind == "threads")


def test_the_command_refuses_in_a_sentence(trees, tmp_path, capsys):
    for options, why in (
        (["--trees", str(tmp_path / "none.json")], "none.json"),
        (["--trees", str(trees), "--kv-tokens", "64"], "too few"),
        (["--out", str(tmp_path / "none" / "out.json")], "is no folder"),
    ):
        with pytest.raises(SystemExit):
            cluster.main(options)
        assert why in capsys.readouterr().err


def test_small_cases_take_as_many_steps_as_vllm_did():
    known, trees = json.loads(PROTOTYPE.read_text()), read(cluster.TREES)
    limits, limit = EngineLimits(block_size=known["block_size"]), known["max_new_tokens"]
    for count in known["counts"]:
        found = simulate(trees, Setting(count["threads"], count["in_flight"], count["answers"], limit, limits=limits))
        names = {"engine_steps": "engine_steps", "written": "generated", "rows": "mean_running", "kv": "kv"}
        if count["threads"]:
            names |= {"most_kv": "most_kv", "path": "path", "recomputed": "recomputed"}
        for name, counted in names.items():
            assert getattr(found, name) == pytest.approx(count[counted], rel=0.15), (count, name)
    # The trees are float32's, and there it is the same texts and the same waste.
    count = known["float32"]
    found = simulate(trees, Setting(True, count["in_flight"], len(trees), limit, limits=limits))
    assert found.shown == count["text"] and found.per_100 == pytest.approx(count["per_100"], abs=0.5)
    assert found.unknown == 0
