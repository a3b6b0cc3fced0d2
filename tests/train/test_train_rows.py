"""The rows of a run: parted, encoded, and judged as the one file that they came from."""

import json
import re
from pathlib import Path

import pytest

from lora import LoraError
from lora.train import run
from lora.train.base import load_tokenizer
from lora.train.checks import cheap
from lora.train.dry_run import dry_run
from lora.train.recipe import Recipe
from lora.train.rows import run_rows
from tiny_base import save_tiny_base


def test_rows_without_use_are_a_share_of_the_file_whichever_part_they_fall_into(tmp_path: Path) -> None:
    base = str(save_tiny_base(tmp_path / "base"))
    rows = [{"prompt": f"count {n}", "completion": "0 1 2" if n % 100 else " "} for n in range(1, 201)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tokenizer = load_tokenizer(base)
    for seed in range(4):  # both bad rows fall into one half for some of them
        recipe = Recipe.of(
            model=base, data=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "out"), eval_share=0.5, seed=seed
        )
        said: list[str] = []
        found = run_rows(recipe, tokenizer, said.append)
        assert len(found.encoded.rows) + len(found.measured) == 198
        assert sum(int(count) for count in re.findall(r"(\d+) of \d+ rows cannot be trained on", "".join(said))) == 2


@pytest.mark.parametrize("idle", [{"early_stop": 3}, {"eval_every": 5}, {"samples": 7}])
def test_what_is_done_with_held_out_rows_is_refused_where_there_are_none(tmp_path: Path, idle: dict[str, int]) -> None:
    recipe = Recipe.of(model="nowhere", data="none.jsonl", out=str(tmp_path / "out"), **idle)
    said = f"{next(iter(idle))}=. needs eval_data or eval_share"
    for start in (run, cheap):
        with pytest.raises(LoraError, match=said):
            start(recipe)
    assert re.match(said, str(dry_run(recipe)[1]))  # the first thing that would stop the run
    assert not (tmp_path / "out").exists()
