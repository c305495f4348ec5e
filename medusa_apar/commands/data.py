"""Cut the answers of chat corpora into paragraph trees, the training examples of `medusa-apar finetune`.

A CORPUS is a file of chat JSONL ({"messages": [{"role", "content"}, ...]} per line), ShareGPT's own JSON
({"conversations": [{"from", "value"}, ...]}), instruction/output records, any of them gzipped, or the name of a
Hugging Face data set (owner/name or owner/name:split; needs the [train] extra).

An answer forks after the headings of its sections, the heads of its list items or the first sentences of its
paragraphs, and its parts fork once more below; three forks at least. Code, maths, tables, markup, links, letters,
stories and Chinese, Japanese or Korean text stay whole: the model also learns where not to fork.

DIR gets examples.jsonl, log.jsonl and report.json (counts by rule, by reason for staying whole, by reason dropped).
It takes seconds; a run that was stopped leaves no examples.jsonl and is simply started again.

  medusa-apar data chats.jsonl sharegpt.json.gz --out examples
  medusa-apar data chats.jsonl --out examples --show 5        # look at five trees
"""

from __future__ import annotations

import argparse
from pathlib import Path

from medusa_apar.arguments import add_bad_lines, check_files, number, out_folder

HELP = "chat corpora to paragraph trees"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("corpora", nargs="+", metavar="CORPUS", help="file or data set name")
    add("--out", type=out_folder, required=True, metavar="DIR", help="where the examples go")
    add_bad_lines(parser, templated=False)
    add("--all-turns", action="store_true", help="every answer of a conversation is a target, not only its last")
    add("--max-depth", type=number(int, 0, 8), default=2, metavar="N", help="of the trees (default: %(default)s)")
    add(
        "--agree-with",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="corpora with the same ids: keep an answer only if it forks where theirs does (for a model's own answers)",
    )
    add(
        "--disagreeing",
        choices=("drop", "whole"),
        default="drop",
        help="an answer that would fork where theirs does not is left out, or kept whole so that the model learns "
        "to tell by the prompt (default: drop)",
    )
    add(
        "--looping",
        choices=("drop", "avoid"),
        default="drop",
        help="answers that say the same again and again are left out, or are the only ones kept: `finetune` makes what "
        "they repeat unlikely (default: drop)",
    )
    add("--show", type=number(int, 0), default=0, metavar="N", help="print N forking answers with their control tokens")


def run(args: argparse.Namespace) -> int:
    from medusa_apar.finetune.data import make_examples
    from medusa_apar.job import Job

    check_files(args.agree_with or [])
    if args.disagreeing == "whole" and not args.agree_with:
        raise ValueError("--disagreeing needs --agree-with: there is nothing to disagree with")
    settings = {key: value for key, value in vars(args).items() if key != "command"}
    with Job(args.out, "data", settings) as job:
        make_examples(
            job,
            args.corpora,
            skip_bad=args.bad_lines == "skip",
            all_turns=args.all_turns,
            max_depth=args.max_depth,
            agree_with=args.agree_with or [],
            keep_whole=args.disagreeing == "whole",
            loops=args.looping == "avoid",
            show_count=args.show,
        )
    return 0
