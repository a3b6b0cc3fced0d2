"""What the benchmarks on a GPU share: CUDA graphs in turns, training steps between events, a tokenizer for a peer."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch


def _between_events(run: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    return start, end


def _capture(run: Callable[[int], object], calls: int, inputs: int) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(2):  # compiles, and makes what is made once, outside of the capture
            run(i % inputs)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i % inputs)
    return graph


def race(
    runs: dict[str, Callable[[int], object]], calls: int = 2, inputs: int = 2, rounds: int = 11, heat: float = 0.3
) -> dict[str, float]:
    """Median microseconds of one call of each, as CUDA graphs whose replays take turns, the card warm.

    Args:
        runs: called with the number of the input set, of which there are `inputs`; calls: in one graph.
    """
    graphs = {name: _capture(run, calls, inputs) for name, run in runs.items()}
    end = time.time() + heat
    while time.time() < end:
        for graph in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
    times: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    names = list(graphs)
    for k in range(rounds):
        for i in range(len(names)):
            name = names[(i + k) % len(names)]
            times[name].append(_between_events(graphs[name].replay))
    torch.cuda.synchronize()
    return {n: statistics.median(a.elapsed_time(b) for a, b in pairs) * 1e3 / calls for n, pairs in times.items()}


def training_step(
    model: Any, optimizer: Any, ids: torch.Tensor, context: AbstractContextManager[Any]
) -> Callable[[], None]:
    """A function that takes one step on ids (rows, tokens); without an optimizer forward and backward alone."""

    def step() -> None:
        with context:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return step


def time_of_steps(step: Callable[[], None], count: int) -> dict[str, float]:
    """The median of so many steps in ms, and their 20th and 80th percentile."""
    events = [_between_events(step) for _ in range(count)]
    torch.cuda.synchronize()
    ms = sorted(start.elapsed_time(end) for start, end in events)
    low, high = ms[len(ms) // 5], ms[-1 - len(ms) // 5]
    return {"ms": round(statistics.median(ms), 2), "ms_p20": round(low, 2), "ms_p80": round(high, 2)}


def print_kernels(step: Callable[[], None]) -> None:
    """The time of one step by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step()
    print(profiler.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=70))


def save_tokenizer(folder: Path) -> None:
    """A tokenizer of 93 tokens, for a peer that loads model and tokenizer from one folder."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{chr(33 + i): 3 + i for i in range(90)}}
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
