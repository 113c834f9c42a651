"""``data describe``, ``data check``, ``data pack``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_fl.data.federation import DataConfig


def add(verbs: Any) -> None:
    """The verb and its three verbs."""
    p = verbs.add_parser("data", help="describe, check or pack a federation's data", allow_abbrev=False)
    p.set_defaults(call=run)
    data = p.add_subparsers(dest="data_verb", metavar="VERB", required=True)
    for verb, text in (("describe", "class counts and who holds what"), ("pack", "one federation as a Parquet folder")):
        q = data.add_parser(verb, help=text, description=text, allow_abbrev=False)
        q.add_argument("source", help="digits, cifar10, cifar100, imagenet-lt, folder:PATH, hf:NAME, pack:PATH")
        q.add_argument("--root", help="folder of the data set (else $MLLM_FL_DATA)")
        q.add_argument("--imbalance-factor", type=float, default=1.0)
        known = ["creff", "dirichlet", "iid", *(["virtual"] if verb == "describe" else [])]
        q.add_argument("--partition", default="creff", choices=known)
        q.add_argument("--alpha", type=float, default=0.5)
        q.add_argument("--clients", type=int, default=20)
        q.add_argument("--seed", type=int, default=7)
        q.add_argument(
            "--min-size",
            type=int,
            default=10,
            help="smallest client of a dirichlet partition, every client of a virtual one (default 10)",
        )
        q.add_argument("--image-size", type=int, help="pixels a side (default: the source's own)")
        q.add_argument("--manifest", help="a saved manifest that decides who holds what")
        if verb == "describe":
            q.add_argument("--json", action="store_true", help="exactly one JSON object on stdout")
            q.add_argument("--save-manifest", type=Path, help="also write who holds what to this file")
        else:
            q.add_argument("--out", type=Path, required=True, help="folder to write")
    q = data.add_parser("check", help="corrupt, duplicate and leaked images", allow_abbrev=False)
    q.add_argument("sources", nargs="+", help="sources; images of one that are in another's test set are leaks")
    q.add_argument("--root", help="folder of the data sets (else $MLLM_FL_DATA)")
    q.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Do what the second verb says."""
    if args.data_verb == "check":
        from mllm_fl.data.check import check

        report = check(args.sources, root=args.root)
        print(json.dumps(report.to_dict()) if args.json else report.text())
        return 0 if report.clean else 1
    from mllm_fl.data.federation import build

    federation = build(_data_config(args))
    if args.data_verb == "describe":
        from mllm_fl.data.describe import render, summary
        from mllm_fl.data.manifest import save

        if args.save_manifest:
            save(federation.manifest, args.save_manifest)
        described = summary(federation)
        print(json.dumps(described) if args.json else render(described, federation.class_names))
        return 0
    from mllm_fl.data.pack import pack

    print(pack(federation, args.out))
    return 0


def _data_config(args: argparse.Namespace) -> DataConfig:
    from mllm_fl.data.federation import DataConfig

    return DataConfig(
        source=args.source, root=args.root, imbalance_factor=args.imbalance_factor, partition=args.partition, alpha=args.alpha,
        clients=args.clients, seed=args.seed,
        min_size=args.min_size, image_size=args.image_size, manifest=args.manifest,
    )  # fmt: skip
