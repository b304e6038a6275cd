"""What the ordinary run compiles shows every value of every field, and stays below the limit."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest

from cupyflash.plan.specs import CombineSpec, Features, FwdSpec
from cupyflash.plan.tiles import TileConfig
from cupyflash.tools.kernels import ARCHITECTURES
from tests.compile.selection import LIMIT, Pair, every_pair, fields_of, representative


def many_pairs() -> list[Pair]:
    """As many as a family for every head dim has, some for the oldest GPUs alone."""
    dims = [(32, 32), (64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
    tiles = [TileConfig(m, n, m // 16) for m in (64, 128) for n in (32, 64)]
    features = [Features(), Features(has_upper=True), Features(True, True), Features(True, True, True)]
    both = (False, True)
    pairs = []
    for arch in ARCHITECTURES:
        old = arch == "sm_75"
        for d, tile, feature, packed in itertools.product(dims, tiles, features, both):
            for dtype in ("float16",) if old else ("float16", "bfloat16"):
                spec = FwdSpec("fwd_sm80", dtype, *d, tile, feature, packed, 75 if old else 80)
                pairs.append(Pair(spec, arch))
        for dtype, d in itertools.product(("float32", "float64"), dims):
            pairs.append(Pair(FwdSpec("fwd_simt", dtype, *d, tiles[0], Features(), baseline=75), arch))
        pairs += [Pair(CombineSpec(dtype), arch) for dtype in ("float16", "float32")]
    return pairs


def values(pairs: list[Pair]) -> set[tuple[Any, ...]]:
    return {(pair.spec.family, *field) for pair in pairs for field in fields_of(pair.spec)}


@pytest.mark.parametrize("pairs", [every_pair(), many_pairs()], ids=["the family", "a large one"])
def test_every_value_is_shown(pairs: list[Pair]) -> None:
    chosen = representative(pairs)
    print(f"{len(chosen)} cubins of {len(pairs)}")
    assert len(chosen) <= LIMIT
    assert set(chosen) <= set(pairs)
    assert values(chosen) == values(pairs)
    for of in (
        lambda pair: (pair.spec.family, pair.arch),
        lambda pair: (
            isinstance(pair.spec, FwdSpec)
            and (pair.spec.family, pair.spec.dtype, pair.spec.head_dim, pair.spec.head_dim_v, pair.spec.tile)
        ),
    ):
        assert set(map(of, chosen)) == set(map(of, pairs))


def test_a_large_family_is_sifted() -> None:
    assert len(many_pairs()) > 3000
    assert 100 < len(representative(many_pairs())) <= LIMIT


def test_the_same_every_time() -> None:
    pairs = many_pairs()
    chosen = representative(pairs)
    assert representative(many_pairs()) == chosen
    random.Random(0).shuffle(pairs)
    assert len(representative(pairs)) <= LIMIT


def test_fields_within_fields_count() -> None:
    spec = FwdSpec("fwd_sm80", "float16", 64, 64, TileConfig(128, 64, 8), Features(has_upper=True))
    found = dict(fields_of(spec))
    assert found["tile.block_m"] == 128
    assert found["features.has_upper"] is True
    assert found["packed"] is False
    assert found["tile"] == spec.tile


def test_a_limit_that_does_not_suffice() -> None:
    with pytest.raises(ValueError, match="5 cubins do not suffice to show every trait"):
        representative(many_pairs(), 5)
