"""The picture of what left shows what the report says."""

import io

import matplotlib.image
import pytest

from hf_prune.errors import PruneError
from hf_prune.report.picture import draw, kept_grids


def site(target, name, n_units, removed):
    return {"target": target, "name": name, "n_units": n_units, "n_kept": n_units - len(removed), "removed": removed}


CONTENT = {
    "sites": [
        site("attention_heads", "layer.0.attention", 4, [1]),
        site("attention_heads", "layer.1.attention", 3, []),
        site("ffn_neurons", "layer.0", 128, list(range(96))),
        site("layers", "layer", 2, []),
    ],
    "weights": [{"name": "layer.0.query", "n_entries": 8, "n_zero": 2}],
}


def test_cells_are_units_or_stretches_of_them():
    grids = kept_grids(CONTENT)
    assert grids["attention_heads"] == {"layer.0.attention": [1, 0, 1, 1], "layer.1.attention": [1, 1, 1]}
    assert grids["ffn_neurons"] == {"layer.0": [0.0] * 48 + [1.0] * 16}
    assert grids["weights"] == {"layer.0.query": [0.75]}
    assert "layers" not in grids, "no layer left"


def test_uneven_stretches_count_each_unit_once():
    removed = list(range(50))
    row = kept_grids({"sites": [site("ffn_neurons", "x", 100, removed)]})["ffn_neurons"]["x"]
    assert len(row) == 64 and row[0] == 0 and row[-1] == 1
    lengths = [(number + 1) * 100 // 64 - number * 100 // 64 for number in range(64)]
    assert sum(share * length for share, length in zip(row, lengths, strict=True)) == pytest.approx(50)


def test_a_picture_is_a_picture(tmp_path):
    draw(CONTENT, tmp_path / "new" / "left.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "new" / "left.png").shape
    assert width > height > 100
    file = io.BytesIO()
    draw(CONTENT, file)
    assert file.getvalue().startswith(b"\x89PNG")


def test_what_can_not_be_drawn_is_said(tmp_path):
    with pytest.raises(PruneError, match="nothing left"):
        draw({"sites": [site("layers", "layer", 2, [])]}, tmp_path / "x.png")
    with pytest.raises(PruneError, match="xyz"):
        draw(CONTENT, tmp_path / "x.xyz")
