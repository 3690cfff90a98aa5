"""Index arithmetic on literal numbers, and against loops."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpt.model.encoders.grids import Places


def places(shapes: list[tuple[int, int, int]]) -> Places:
    grid = torch.tensor(shapes)
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), grid.prod(1).cumsum(0)])
    return Places.of(grid, edges, int(edges[-1]))


def test_rows_and_columns():
    """Two frames of 1 x 2, then a picture of 2 x 3."""
    rows, columns = places([(2, 1, 2), (1, 2, 3)]).positions().tolist()
    assert rows == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert columns == [0, 1, 0, 1, 0, 1, 2, 0, 1, 2]


def test_squares_stay_within_a_frame():
    """A picture of 2 x 4, then two frames of 2 x 2."""
    assert places([(1, 2, 4), (2, 2, 2)]).squares(2).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, *range(8, 16)]


def test_class_tokens_stand_before_their_items():
    classes = places([(1, 1, 2), (1, 1, 1)]).class_first()
    tokens, patches = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[10.0], [11.0], [20.0]])
    packed = classes.insert(tokens, patches)
    assert packed.flatten().tolist() == [-1, 10, 11, -2, 20]
    assert torch.equal(classes.tokens(packed), tokens) and torch.equal(classes.patches(packed), patches)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5),
    side=st.integers(1, 3),
)
@settings(max_examples=50, deadline=None)
def test_against_loops(shapes: list[tuple[int, int, int]], side: int):
    shapes = [(t, h * side, w * side) for t, h, w in shapes]
    positions, squares, start = [], [], 0
    for t, h, w in shapes:
        for frame in range(t):
            positions += [(row, column) for row in range(h) for column in range(w)]
            corners = [(row, column) for row in range(0, h, side) for column in range(0, w, side)]
            inner = [(a, b) for a in range(side) for b in range(side)]
            squares += [start + frame * h * w + (row + a) * w + column + b for row, column in corners for a, b in inner]
        start += t * h * w
    found = places(shapes)
    assert found.positions().T.tolist() == [list(position) for position in positions]
    assert found.squares(side).tolist() == squares
