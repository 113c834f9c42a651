"""``corpus import|check|export|card`` and ``review``: what becomes of annotations before anything is trained on them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllm_fl.errors import UserError

if TYPE_CHECKING:
    from mllm_fl.annotate.backends.base import Backend
    from mllm_fl.annotate.quality.check import Checked
    from mllm_fl.annotate.quality.sheet import Sheet

EXPORTS = ("llava", "jsonl", "webdataset", "huggingface", "corpus")


def add(verbs: Any) -> None:
    """The two verbs."""
    p = verbs.add_parser(
        "review", help="look at a sample of a corpus in the browser: keep, relabel, drop", allow_abbrev=False
    )
    p.add_argument("corpus", type=Path)
    p.add_argument("--sample", type=int, default=100, help="records that are drawn (default 100)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--kept", action="store_true", help="draw only from records that failed no check")
    p.add_argument("--port", type=int, default=0, help="of the page on 127.0.0.1 (default: any free one)")
    p.add_argument("--no-browser", action="store_true", help="only print the address")
    p.add_argument("--export", type=Path, metavar="FILE", help="write the sample as Label Studio tasks instead")
    p.add_argument(
        "--import", dest="bring", type=Path, metavar="FILE", help="take the decisions of a Label Studio export"
    )
    p.set_defaults(call=review)
    c = verbs.add_parser("corpus", help="import, check, export or describe a corpus", allow_abbrev=False)
    corpus = c.add_subparsers(dest="corpus_verb", metavar="VERB", required=True)
    q = corpus.add_parser("import", help="bring pictures or a corpus of others into a folder", allow_abbrev=False)
    q.add_argument(
        "source", help="LLaVA's .json or .jsonl, a folder (pictures, Parquet, Arrow, .tar), hf:NAME, urls:FILE"
    )
    q.add_argument(
        "out", type=Path, help="the corpus folder; the same command again tries only pictures that are not ok"
    )
    q.add_argument("--images", type=Path, help="folder or zip of a LLaVA file's pictures (default: beside it)")
    q.add_argument("--captions", action="store_true", help="captions become records, not truth to check others against")
    q.add_argument("--licence", help="of pictures whose source names none")
    q.add_argument("--limit", type=int, help="only so many items")
    q.set_defaults(call=bring_in)
    q = corpus.add_parser("check", help="every check, and a funnel of how many fell where", allow_abbrev=False)
    q.add_argument("corpus", type=Path)
    q.add_argument(
        "--evaluation",
        action="append",
        default=[],
        metavar="SOURCE",
        help="its test images must not be in here (cifar10, folder:PATH, ...); may be repeated",
    )
    q.add_argument("--root", help="folder of the evaluation sets (else $MLLM_FL_DATA)")
    q.add_argument("--licence", action="append", default=[], metavar="NAME", help="an allowed licence; may be repeated")
    q.add_argument(
        "--inspect",
        action="append",
        default=[],
        metavar="NAME=MODULE:FUNCTION",
        help="a detector of yours (nsfw, faces, ...): PIL image in, reason or None out",
    )
    q.add_argument("--min-side", type=int, default=16)
    q.add_argument("--max-aspect", type=float, default=8.0)
    q.add_argument("--language", default="en")
    q.add_argument("--words", type=int, nargs=2, default=[1, 600], metavar=("FEWEST", "MOST"))
    q.add_argument("--clip", help="the CLIP that scores: mini, a folder or a hub id")
    q.add_argument("--clip-percentile", type=float, default=5.0, help="records below it fall (default 5)")
    q.add_argument(
        "--probe",
        metavar="MODEL",
        help="who is asked yes/no questions: mini, a model folder, a hub id, or a CONFIG.toml whose annotator it is",
    )
    q.add_argument("--probes", type=int, default=500, help="questions per kind of truth (default 500)")
    q.add_argument("--json", action="store_true", help="exactly one JSON object on stdout")
    q.set_defaults(call=check)
    q = corpus.add_parser("export", help="the records that passed, in a form that others read", allow_abbrev=False)
    q.add_argument("corpus", type=Path)
    q.add_argument("out", type=Path, help="a folder that is not there yet")
    q.add_argument("--form", choices=EXPORTS, default="llava")
    q.add_argument("--all", action="store_true", help="also records that failed a check or were dropped")
    q.set_defaults(call=send_out)
    q = corpus.add_parser("card", help="the corpus as a Markdown page", allow_abbrev=False)
    q.add_argument("corpus", type=Path)
    q.add_argument("--out", type=Path, help="file to write (default: print)")
    q.add_argument("--title", default="Corpus card")
    q.add_argument("--sample", type=int, default=12, help="records of the review sample that are shown (default 12)")
    q.add_argument("--note", action="append", default=[], help="a paragraph to add; may be repeated")
    q.set_defaults(call=card)


def bring_in(args: argparse.Namespace) -> int:
    """``corpus import``."""
    from mllm_fl.annotate.imports import import_corpus
    from mllm_fl.console import Screen

    if args.limit is not None and args.limit < 1:
        raise UserError("--limit", f"{args.limit} is below 1")
    with Screen() as screen:
        found = import_corpus(
            args.source, args.out, images=args.images, captions=args.captions, licence=args.licence, limit=args.limit, progress=screen.progress("import")
        )  # fmt: skip
    states = ", ".join(f"{n:,} {s}" for s, n in found.coverage.items() if n and s != "wanted")
    print(f"{found.folder}: {found.records:,} records; {found.coverage['wanted']:,} pictures: {states or 'none'}")
    for why, n in sorted(found.left_out.items(), key=lambda x: -x[1]):
        print(f"  left out (left_out.jsonl): {n:,} records: {why}")
    return 0


def check(args: argparse.Namespace) -> int:
    """``corpus check``: exit status 0 also when records fall; they are listed, not condemned."""
    from mllm_fl.annotate.quality.check import QualityConfig, summary
    from mllm_fl.annotate.quality.check import check as run
    from mllm_fl.console import Screen

    config = QualityConfig(
        min_side=args.min_side, max_aspect=args.max_aspect, evaluation=tuple(args.evaluation), licences=tuple(args.licence), language=args.language,
        words=(args.words[0], args.words[1]), clip=args.clip, clip_percentile=args.clip_percentile, inspect=tuple(args.inspect), root=args.root, probes=args.probes,
    )  # fmt: skip
    asker = None
    if args.probe:
        from mllm_fl.annotate.quality.asking import asker_of

        asker = asker_of(_answerer(args.probe), args.corpus)
    with Screen(json_lines=False) as screen:
        found = run(args.corpus, config, screen.progress("check"), asker=asker)
    print(
        json.dumps(summary(found) | {"hallucination": found.hallucination}) if args.json else _text(found, args.corpus)
    )
    return 0


def _answerer(name: str) -> Backend:
    """Who is asked: the annotator of a configuration file, or a model by name."""
    if name.endswith(".toml"):
        from mllm_fl.config import load
        from mllm_fl.stages.annotate import make_backend

        found = load(Path(name)).runs[0].annotate
        if found is None:
            raise UserError(name, "has no [annotate] table", "name a configuration with an annotator")
        return make_backend(found)
    from mllm_fl.annotate.backends.local import LocalBackend

    return LocalBackend(name, max_tokens=32)


def _text(found: Checked, folder: Path) -> str:
    lines = []
    for sheet in (found.images, found.records):
        lines += [f"{sheet.of}: {len(sheet.items):,}", *_funnel(sheet), f"  {'kept':16}{len(sheet.kept()):>9,}"]
    for row in found.hallucination:
        share = (
            "-"
            if row["records_false_share"] is None
            else f"{100 * row['records_false_share']:.1f} % ({100 * row['low']:.1f} to {100 * row['high']:.1f})"
        )
        lines.append(
            f"false against {row['truth']}, {row['kind']}: {share} of {row['decidable']:,} records that say something decidable"
        )
    for row in (found.probes or {}).get("kinds", []):
        lines.append(
            f"yes/no probes against {row['truth']}: {100 * row['accuracy']:.1f} % of {row['asked']:,} right, says yes to {100 * row['yes']:.0f} %"
        )
    return "\n".join([*lines, f"every finding: {folder / 'quality.jsonl'}"])


def _funnel(sheet: Sheet) -> list[str]:
    lines = [f"  {'check':16}{'fell here':>9}{'in all':>9}  status"]
    for s in sheet.funnel():
        checked = len(sheet.items) - s.not_checked
        status = f"not checked: {s.why_not}" if checked <= 0 and s.not_checked else "ok" if not s.failed else "failed"
        status += f"; {s.not_checked:,} not checked: {s.why_not}" if 0 < s.not_checked < len(sheet.items) else ""
        lines.append(f"  {s.check:16}{s.fell:>9,}{s.failed:>9,}  {status}")
    return lines


def send_out(args: argparse.Namespace) -> int:
    """``corpus export``."""
    from mllm_fl.annotate.corpus import Corpus
    from mllm_fl.annotate.exports import export
    from mllm_fl.console import Screen

    with Screen() as screen:
        found = export(
            Corpus.open(args.corpus), args.out, args.form, everything=args.all, progress=screen.progress("export")
        )
    print(f"{found.out}: {found.records:,} of {found.of:,} records")
    for why, n in sorted(found.stayed.items(), key=lambda x: -x[1]):
        print(f"  stayed behind: {n:,}: {why}")
    return 0


def card(args: argparse.Namespace) -> int:
    """``corpus card``."""
    from mllm_fl.annotate.card import card as written
    from mllm_fl.data.files import write_whole

    text = written(args.corpus, args.title, args.sample, args.note)
    if args.out is None:
        print(text, end="")
        return 0
    write_whole(args.out, text.encode())
    print(args.out)
    return 0


def review(args: argparse.Namespace) -> int:
    """``review``: a page until it is finished or interrupted; or tasks for Label Studio, or their answers."""
    from mllm_fl.annotate import review as reviewing
    from mllm_fl.annotate import review_labelstudio as labelstudio
    from mllm_fl.annotate import truth
    from mllm_fl.annotate.corpus import Corpus
    from mllm_fl.annotate.quality import sheet
    from mllm_fl.annotate.quality.check import read as read_raw
    from mllm_fl.annotate.review_server import ReviewServer, known

    corpus = Corpus.open(args.corpus)
    raw = read_raw(args.corpus)
    sheets = sheet.read(args.corpus, raw.images, raw.ids)
    records = list(corpus.records)
    if args.kept:
        if sheets is None:
            raise UserError(
                args.corpus, "was never checked, so nothing is known to be kept", "run `mllm-fl corpus check`"
            )
        kept = set(sheets[1].kept())
        records = [r for r in records if r.id in kept]
    found = reviewing.Review(args.corpus, records, args.sample, args.seed)
    if args.bring:
        for d in labelstudio.read(args.bring, records).values():
            found.decide(d.id, d.decision, d.answers, d.by)
        print(found.estimate().text())
        return 0
    if args.export:
        n = labelstudio.export(args.corpus, found.sample, found.decisions, args.export)
        print(
            f"{args.export}: {n} tasks; paste {args.export.with_suffix('.xml').name} into the project's labelling interface"
        )
        return 0
    truths = truth.load(args.corpus, corpus.images)
    why = {r.id: sheets[1].reasons(r.id) for r in found.sample} if sheets else {}
    with ReviewServer(found, why, {i: known(t) for i, t in truths.items()}, args.port) as server:
        print(f"review at {server.url} (ctrl-c ends it; every decision is saved at once)", flush=True)
        if not args.no_browser:
            import webbrowser

            webbrowser.open(server.url)
        try:
            server.finished.wait()
        except KeyboardInterrupt:
            print()
    print(found.estimate().text())
    return 0
