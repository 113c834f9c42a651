"""A review in Label Studio: tasks out, annotations in, in its JSON (https://labelstud.io/guide/export, "Raw JSON format of completed tasks").

The pictures travel inside the tasks as data addresses, so that no file server is needed. ``CONFIG`` is the labelling interface to paste into the project.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mllm_fl.annotate.records import IMAGE, Record
from mllm_fl.annotate.review import DECISIONS, Decision, applied
from mllm_fl.data.decode import to_rgb
from mllm_fl.data.files import write_whole
from mllm_fl.errors import UserError

CONFIG = """<View>
  <Image name="picture" value="$image"/>
  <Text name="text" value="$text"/>
  <Choices name="decision" toName="picture" choice="single" required="true">
    <Choice value="keep" hotkey="k"/><Choice value="relabel" hotkey="r"/><Choice value="drop" hotkey="d"/>
  </Choices>
  <TextArea name="answers" toName="picture" value="$answers" visibleWhen="choice-selected" whenTagName="decision" whenChoiceValue="relabel"/>
</View>
"""
"""``answers`` takes the new answers, one text each, in order."""
_TYPES = {"PNG": "png", "JPEG": "jpeg", "WEBP": "webp", "GIF": "gif"}


def tasks(folder: Path, records: Sequence[Record], decisions: Mapping[str, Decision]) -> list[dict[str, Any]]:
    """A task per record; decisions that were made already come along as annotations.

    Raises:
        UserError: a picture that cannot be read.
    """
    return [_task(n, folder, r, decisions.get(r.id)) for n, r in enumerate(records, 1)]


def _task(n: int, folder: Path, record: Record, decision: Decision | None) -> dict[str, Any]:
    said = "\n".join(
        f"{'Q' if t.speaker == 'human' else 'A'}: {t.text.replace(IMAGE, '').strip()}" for t in record.turns
    )
    data = {
        "image": _address(folder / record.image),
        "text": said,
        "answers": list(record.answers),
        "record": record.id,
        "path": record.image,
        "kind": record.kind,
    }
    task: dict[str, Any] = {"id": n, "data": data, "annotations": [], "predictions": []}
    if decision is not None:
        result: list[dict[str, Any]] = [_result("decision", "choices", {"choices": [decision.decision]})]
        if decision.decision == "relabel":
            result.append(_result("answers", "textarea", {"text": list(decision.answers)}))
        at = datetime.fromtimestamp(decision.at, UTC).isoformat().replace("+00:00", "Z")
        task["annotations"] = [
            {
                "id": n,
                "result": result,
                "was_cancelled": False,
                "created_at": at,
                "updated_at": at,
                "completed_by": decision.by or 1,
            }
        ]
    return task


def _result(name: str, type: str, value: dict[str, Any]) -> dict[str, Any]:
    return {"id": f"mllm-{name}", "from_name": name, "to_name": "picture", "type": type, "value": value}


def _address(path: Path) -> str:
    try:
        to_rgb(path)
        content = path.read_bytes()
    except (OSError, ValueError) as e:
        raise UserError(path, f"cannot be read ({e})", "restore it, or review other records") from None
    kind = (
        "png"
        if content.startswith(b"\x89PNG")
        else "webp"
        if content.startswith(b"RIFF")
        else "gif"
        if content.startswith(b"GIF")
        else "jpeg"
    )
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def export(folder: Path, records: Sequence[Record], decisions: Mapping[str, Decision], out: Path) -> int:
    """Write the tasks to ``out``, and the labelling interface beside it (``.xml``); returns how many."""
    found = tasks(folder, records, decisions)
    write_whole(out, (json.dumps(found, ensure_ascii=False, indent=1) + "\n").encode())
    write_whole(out.with_suffix(".xml"), CONFIG.encode())
    return len(found)


def read(path: Path, records: Iterable[Record]) -> dict[str, Decision]:
    """The decisions in an export of Label Studio, by record id. Of several annotations of a task the last one that was not cancelled counts.

    Raises:
        UserError: not such an export, a record that is not in this corpus, or a relabelling without its answers.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(
            path, f"cannot be read as JSON ({e})", "export the project as JSON, not JSON-MIN or CSV"
        ) from None
    if not isinstance(raw, list):
        raise UserError(path, "is no list of tasks", "export the project as JSON, not JSON-MIN or CSV")
    known = {r.id: r for r in records}
    out: dict[str, Decision] = {}
    for n, task in enumerate(raw, 1):
        place = f"{path}: task {n}"
        try:
            id, done = str(task["data"]["record"]), [a for a in task["annotations"] if not a.get("was_cancelled")]
            values = {r["from_name"]: r["value"] for r in done[-1]["result"]} if done else {}
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                place,
                "lacks data.record or annotations",
                "import the tasks that `mllm-fl review --export` wrote, and export as JSON",
            ) from None
        if id not in known:
            raise UserError(
                place, f"record {id!r} is not in this corpus", "import it into the corpus that it was exported from"
            )
        if "decision" not in values:
            continue
        out[id] = _decided(known[id], values, done[-1], place)
    return out


def _decided(record: Record, values: Mapping[str, Any], annotation: Mapping[str, Any], place: str) -> Decision:
    try:
        choice = values["decision"]["choices"][0]
        said = values.get("answers", {}).get("text", [])
        answers = (said,) if isinstance(said, str) else tuple(str(t) for t in said)
        at = datetime.fromisoformat(
            str(annotation.get("updated_at") or annotation.get("created_at") or "1970-01-01T00:00:00Z").replace(
                "Z", "+00:00"
            )
        ).timestamp()
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        raise UserError(
            place, "its annotation is not of our labelling interface", "use the .xml that was written beside the tasks"
        ) from None
    by = annotation.get("completed_by", "")
    found = Decision(
        record.id, str(choice), answers if choice == "relabel" else (), at, by if isinstance(by, str) else ""
    )
    if found.decision not in DECISIONS or (
        found.decision == "relabel" and (len(answers) != len(record.answers) or not all(a.strip() for a in answers))
    ):
        raise UserError(
            place,
            f"decision {choice!r} with {len(answers)} answers does not fit the record's {len(record.answers)}",
            "give every answer anew",
        )
    applied(record, found)
    return found
