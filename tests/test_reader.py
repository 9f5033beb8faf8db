"""Reading a run: names as others write them, shards on their own, parts whose shards are in a bucket by now."""

from __future__ import annotations

import pytest

from jax_extract import UserError
from models.hooks import resolve_hook_points


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("resid_pre", "residual_before"),
        ("resid_mid", "after_attention"),
        ("resid_post", "after_block"),
        ("hook_resid_post", "after_block"),
        ("residual_after", "after_block"),
        ("attn_out", "attention_out"),
        ("mlp_out", "ffn_out"),
        ("mlp.hook_post", "ffn_hidden"),
        ("ln_final", "final_norm"),
        ("blocks.3.resid_post", "blocks.{i}.hook_resid_post"),
        ("blocks.3.hook_out", "blocks.{i}.hook_resid_post"),
    ],
)
def test_a_name_that_is_nearly_transformer_lenss_leads_to_the_hook_point_it_means(name: str, meant: str) -> None:
    with pytest.raises(UserError, match="unknown hook point") as error:
        resolve_hook_points([name])
    assert f"{name!r}; the nearest name is {meant!r}; the hook points are" in str(error.value)
