"""What `verify` prints: the answer in the first line, then what differs, then what the models compute."""

import math
from dataclasses import replace

import pytest

from qwen3vl_convert.verify.result import Verification
from qwen3vl_convert.verify.terminal import terminal_lines
from verify.verifications import (
    difference,
    different_weights,
    equal_weights,
    failing,
    logits,
    odd,
    passing,
    points,
    prompt,
    verification,
    weights,
)


@pytest.mark.parametrize(
    ("found", "first"),
    [
        (equal_weights(), "EQUAL: 383 tensors, 1,020,140,032 elements, bit for bit."),
        (
            passing(),
            "EQUAL: 383 tensors, 1,020,140,032 elements, bit for bit; the logits of 5 prompts agree within rounding.",
        ),
        (different_weights(), "DIFFERENT: 27 of 383 tensors, 0 settings."),
        (failing(), "DIFFERENT: 3 of 383 tensors, 1 setting, 4 of 5 prompts."),
    ],
)
def test_the_first_line_is_the_answer(found: Verification, first: str) -> None:
    assert terminal_lines(found)[0] == first


def test_equal_weights_are_one_line() -> None:
    assert len(terminal_lines(equal_weights())) == 1


def test_an_allowed_rounding_is_said() -> None:
    found = verification(weights(tolerated="the wider dtype is rounded"))
    assert terminal_lines(found)[0].endswith("elements, after the rounding that was allowed.")


def test_a_setting_says_both_sides() -> None:
    assert "  rope_theta: 5000000 in the HF folder, 500000 in the Megatron checkpoint" in terminal_lines(failing())


def test_a_tensor_says_what_happened_and_by_how_much() -> None:
    found = verification(
        weights(difference(3, guess="transposed"), difference(2, count=1, cosine=0.9, max_abs=math.nan))
    )
    assert terminal_lines(found)[1:] == [
        "  model.language_model.layers.2.self_attn.k_proj.weight: 1 of 2,097,152 elements differs, by NaN or 33,412 "
        "ULP at most, the first at [0, 1]",
        "  model.language_model.layers.3.self_attn.k_proj.weight: transposed",
        "    2,097,024 of 2,097,152 elements differ, by 0.18 or 33,412 ULP at most, the first at [0, 1]",
    ]


def test_a_tensor_of_another_dtype_says_which() -> None:
    found = verification(weights(replace(difference(3), dtypes=("float32", "bfloat16"))))
    assert terminal_lines(found)[1].endswith(
        "k_proj.weight: float32 in the HF folder, bfloat16 in the Megatron checkpoint"
    )


@pytest.mark.parametrize(("most", "shown", "left"), [(20, 20, 7), (26, 26, 1), (27, 27, 0), (0, 0, 27)])
def test_no_more_tensors_than_asked_for(most: int, shown: int, left: int) -> None:
    lines = terminal_lines(different_weights(), most)
    assert sum(line.startswith("  model.") for line in lines) == shown
    expected = [f"  and {left} more (all of them with --json)"] if left else []
    assert [line for line in lines if line.startswith("  and ")] == expected


def test_prompts_are_a_table_whose_figures_stand_below_each_other() -> None:
    lines = terminal_lines(failing())
    start = next(number for number, line in enumerate(lines) if line.startswith("  prompt"))
    rows = lines[start : start + 6]
    end = rows[0].index("max diff") + len("max diff")
    assert [row[:end].rpartition(" ")[2] for row in rows[1:]] == ["3.1", "2.2", "4.0e-5", "0.90", "NaN"]
    assert [row.endswith("differs") for row in rows[1:]] == [True, True, False, True, True]
    assert all(row == row.rstrip() for row in rows)


def test_the_place_and_its_parameters_are_named() -> None:
    lines = terminal_lines(failing())
    where = lines.index("where: Text layer 7, self_attention.linear_qkv: the k heads of group 3 differ.")
    assert lines[where + 1 : where + 3] == [
        "  model.language_model.layers.7.self_attn.k_proj.weight",
        "  model.language_model.layers.7.self_attn.v_proj.weight",
    ]


def test_both_models_are_named_with_what_they_were_fed_and_where() -> None:
    """Their versions, the checkpoints as they were stored, the device, dtypes, the largest difference and its limit."""
    assert terminal_lines(failing())[-4:] == [
        "Hugging Face  transformers 5.23.0, weights of /data/Qwen3-VL-2B-Instruct (bfloat16)",
        "Megatron      Qwen3VLModel on megatron-core 0.16.1, weights of /runs/qwen3-vl/iter_0000100 "
        "(TP2 PP1 EP4 ETP1, bfloat16)",
        "computed on   cuda (NVIDIA H100 80GB HBM3), torch 2.13.0; fp32, and fp64 to tell how much is rounding; "
        "streamed, one layer in memory at a time",
        "logits        largest for its bound: NaN of 2.1e-4 allowed (mixed); 38 s, peak memory 5.21 GB",
    ]


def test_the_prompt_that_is_furthest_for_what_it_may_be_is_named() -> None:
    prompts = (prompt("text", 3e-5, 2e-4), prompt("video", 2e-5, 3e-5), prompt("mixed", 0.0, 0.0))
    lines = terminal_lines(verification(weights(), logits(prompts, points())))
    assert "largest for its bound: 2.0e-5 of 3.0e-5 allowed (video)" in lines[-1]
    lines = terminal_lines(verification(weights(), logits((), ())))
    assert "no prompt was run" in lines[-1]


def test_a_difference_just_beyond_what_is_allowed_is_told_apart_from_it() -> None:
    lines = terminal_lines(verification(weights(), logits((prompt("text", 2.14e-4, 2.11e-4),), points())))
    assert "largest for its bound: 2.14e-4 of 2.11e-4 allowed (text)" in lines[-1]
    assert any("2.14e-4  2.11e-4" in line and line.endswith("differs") for line in lines)


def test_strange_values_are_shown_as_they_are() -> None:
    text = "\n".join(terminal_lines(odd()))
    assert "NaN" in text
    assert "∞" in text
