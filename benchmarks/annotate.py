"""The annotator beside the bare ``openai`` client, against a server of its own that answers after a fixed time.

    python benchmarks/annotate.py                 (--records 1500 --repeats 5 --flight 64 --latency 0.5)

Both send the same JPEG files with the same words, so many at a time; the annotator also claims, checks and writes every answer into its ledger,
and reports progress. They take turns, from either end. Appends one JSON line to results/annotate_bench.jsonl: records a second and
processor seconds a record, medians over the repetitions. The server is another process, so it takes part of the machine, too.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SAID = "A figure stands on an even ground, and its left half is lighter than its right half."


def stub(port: int, latency: float) -> None:
    """An endpoint that reads a chat request and answers it ``latency`` seconds later."""
    message = {"role": "assistant", "content": SAID}
    body = json.dumps(
        {
            "id": "x", "object": "chat.completion", "created": 1, "model": "stub", "usage": {"prompt_tokens": 300, "completion_tokens": 20, "total_tokens": 320},
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        }
    ).encode()  # fmt: skip
    reply = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                await reader.readexactly(int(head.partition(b"content-length:")[2].partition(b"\r\n")[0]))
                await asyncio.sleep(latency)
                writer.write(reply)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", port, limit=1 << 22, backlog=512)
        await server.serve_forever()

    asyncio.run(main())


def pictures(folder: Path, count: int) -> list[Path]:
    """So many different JPEG files of 336 x 336 pixels, about 20 kB each."""
    import numpy as np
    from PIL import Image

    from mllm_fl.seeds import numpy_stream

    folder.mkdir()
    draws = numpy_stream(0, "benchmark-pictures")
    out = []
    for i in range(count):
        coarse = Image.fromarray(draws.integers(0, 256, (42, 42, 3), dtype=np.uint8))
        out.append(folder / f"{i:06d}.jpg")
        coarse.resize((336, 336), Image.Resampling.BICUBIC).save(out[-1], quality=90)
    return out


def bare(files: list[Path], url: str, flight: int) -> list[str]:
    """What a person writes first: the client, a queue, so many workers; answers stay in memory."""
    import openai

    from mllm_fl.annotate.prompts import INSTRUCT

    prompt = INSTRUCT["caption"]

    async def main() -> list[str]:
        client = openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=0)
        left, out = iter(files), []

        async def worker() -> None:
            for path in left:
                picture = "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()
                content = [
                    {"type": "image_url", "image_url": {"url": picture}},
                    {"type": "text", "text": prompt.variants[0][0]},
                ]
                messages: Any = [{"role": "system", "content": prompt.system}, {"role": "user", "content": content}]
                reply = await client.chat.completions.create(
                    model="stub", messages=messages, max_tokens=256, temperature=0.0
                )
                out.append(reply.choices[0].message.content or "")

        await asyncio.gather(*(worker() for _ in range(flight)))
        await client.close()
        return out

    return asyncio.run(main())


def ours(files: list[Path], url: str, flight: int) -> list[str]:
    """The engine of ``mllm-fl annotate``, with a new ledger."""
    from mllm_fl.annotate.backends.openai import OpenAIBackend
    from mllm_fl.annotate.engine import Question, ask
    from mllm_fl.annotate.ledger import Key, Ledger, canonical
    from mllm_fl.annotate.prompts import INSTRUCT

    prompt = INSTRUCT["caption"]
    backend = OpenAIBackend("stub", url, max_tokens=256, concurrency=flight)
    words = canonical(backend.parameters())
    questions = [
        Question(
            Key(f"{i:064x}", "caption", prompt.version, "stub", words), path, prompt, prompt.variants[0], str(path)
        )
        for i, path in enumerate(files)
    ]
    with tempfile.TemporaryDirectory(dir=files[0].parents[1]) as folder:
        with Ledger(Path(folder) / "ledger.sqlite") as ledger:
            ask(questions, ledger, backend, progress=lambda event: None)
            return [texts[0] for texts in ledger.answers([q.key for q in questions]).values()]


def timed(do: Callable[[], list[str]], records: int) -> tuple[float, float]:
    """(records a second, processor seconds of this process a record)."""
    wall, own = time.perf_counter(), time.process_time()
    said = do()
    wall, own = time.perf_counter() - wall, time.process_time() - own
    if said != [SAID] * records:
        raise RuntimeError(f"{len(said)} answers to {records} questions")
    return records / wall, own / records


def main() -> None:
    """Run both in turn and write the line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--flight", type=int, default=64, help="requests in flight")
    parser.add_argument("--latency", type=float, default=0.5, help="seconds until the server answers")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "annotate_bench.jsonl")
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=stub, args=(port, args.latency), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{port}/v1"
    who = {"bare": bare, "mllm-fl": ours}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in who}
    with tempfile.TemporaryDirectory(dir=ROOT / "build" if (ROOT / "build").is_dir() else None) as folder:
        files = pictures(Path(folder) / "pictures", args.records)
        for do in who.values():  # imports, connections, caches
            do(files[: 2 * args.flight], url, args.flight)
        for turn in range(args.repeats):
            for name in list(who) if turn % 2 == 0 else list(who)[::-1]:
                found[name].append(timed(lambda do=who[name]: do(files, url, args.flight), args.records))  # type: ignore[misc]
                print(name, *(f"{x:.4g}" for x in found[name][-1]), flush=True)
        size = round(statistics.mean(f.stat().st_size for f in files))
    server.terminate()
    rate = {name: statistics.median(r for r, _ in rows) for name, rows in found.items()}
    own = {name: statistics.median(c for _, c in rows) for name, rows in found.items()}
    line = {
        "benchmark": "annotate", "records": args.records, "flight": args.flight, "latency_s": args.latency, "image_bytes": size,
        "records_per_s": {k: round(v, 2) for k, v in rate.items()}, "cpu_ms_per_record": {k: round(1e3 * v, 3) for k, v in own.items()},
        "overhead": round(rate["bare"] / rate["mllm-fl"] - 1, 4), "at_most_per_s": args.flight / args.latency,
        "all_records_per_s": {k: [round(r, 2) for r, _ in rows] for k, rows in found.items()}, "repeats": args.repeats, **machine(),
    }  # fmt: skip
    print(json.dumps(line, indent=1))
    args.out.parent.mkdir(exist_ok=True)
    with args.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def machine() -> dict[str, Any]:
    """Where this was measured."""
    import openai

    from mllm_fl.runs import environment

    found = environment()
    return {k: found[k] for k in ("processor", "cores", "commit") if k in found} | {"openai": openai.__version__}


if __name__ == "__main__":
    main()
