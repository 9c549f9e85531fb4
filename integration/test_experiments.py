"""The papers' experiments: what their commands leave behind, their data's formats, and the methods compared with."""

from __future__ import annotations

import gzip
import importlib.util
import json
import math
import runpy
import struct
import sys
from collections.abc import Iterator
from dataclasses import make_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

np = pytest.importorskip("numpy")
for needed in ("matplotlib", "scipy", "sklearn", "tqdm"):
    pytest.importorskip(needed)

from benchmarks.experiments import image_data, report, tabular_data  # noqa: E402
from benchmarks.experiments.command import RESULTS, begin  # noqa: E402
from benchmarks.experiments.measure import Iteration, VectorField, relative_error  # noqa: E402
from benchmarks.experiments.methods import (  # noqa: E402
    BACKPROPAGATION,
    CONTINUOUS,
    DEFAULT,
    EXACT,
    METHODS,
    PER_COMPONENT,
    PER_STEP,
    STAGES_KEPT,
    SYMPLECTIC,
    Solve,
    Solver,
    adaptive,
    fixed,
)
from benchmarks.experiments.physics_data import EQUATIONS, POINTS, Equation, trajectories  # noqa: E402
from benchmarks.experiments.training import train  # noqa: E402

COMMANDS = ("tabular", "images", "physics", "tolerance", "classification", "memory")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, and no waiting for a second thread on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The commands


def comparisons(record: Any) -> Iterator[dict[str, dict[str, float]]]:
    """All figures by method in a JSON record."""
    if isinstance(record, dict):
        if isinstance(record.get(SYMPLECTIC), dict):
            yield record
        for value in record.values():
            yield from comparisons(value)
    elif isinstance(record, list) and not (record and isinstance(record[0], float)):
        for value in record:
            yield from comparisons(value)


@pytest.mark.parametrize("name", COMMANDS)
def test_quick_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_data, "DEBIAN", tmp_path / "none")
    monkeypatch.setattr(sys, "argv", [name, "--quick", "--output", str(tmp_path)])
    runpy.run_module(f"benchmarks.experiments.{name}", run_name="__main__")

    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert record["size"] == "quick"
    assert (tmp_path / f"{name}.md").read_text().startswith("| ")
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    if name == "memory":
        check_memory(record["points"])
        return
    found = list(comparisons(record))
    assert found
    for methods in found:
        assert list(methods) == list(METHODS)
        for row, figures in methods.items():
            assert all(math.isfinite(value) for value in figures.values()), row
            assert figures["seconds"] > 0
            assert figures["loss"] == pytest.approx(methods[BACKPROPAGATION]["loss"], rel=1e-5)
        for row in EXACT:
            assert methods[row]["gradient_error_float64"] <= 1e-12, row
        assert methods[CONTINUOUS]["gradient_error_float64"] > 0
        peaks = {row: methods[row]["peak_bytes"] for row in EXACT}
        assert min(peaks, key=peaks.__getitem__) == SYMPLECTIC
        assert methods[SYMPLECTIC]["evaluations"] > methods[PER_STEP]["evaluations"]
        assert methods[STAGES_KEPT]["evaluations"] <= methods[PER_STEP]["evaluations"]
        assert methods[DEFAULT]["evaluations"] <= methods[STAGES_KEPT]["evaluations"]
        assert methods[PER_COMPONENT]["evaluations"] == 2 * methods[BACKPROPAGATION]["evaluations"]


def check_memory(points: list[dict[str, Any]]) -> None:
    first, last = points[0], points[-1]
    longer = last["steps"] / first["steps"]
    growth = {row: last["peak_bytes"][row] / first["peak_bytes"][row] for row in METHODS}
    assert growth[BACKPROPAGATION] == pytest.approx(longer, rel=0.1)
    assert growth[CONTINUOUS] == pytest.approx(1, rel=0.05)
    assert growth[PER_STEP] < longer / 5
    assert growth[SYMPLECTIC] < longer / 5
    for point in points:
        peaks = point["peak_bytes"]
        assert peaks[SYMPLECTIC] < peaks[PER_STEP] < peaks[PER_COMPONENT] < peaks[BACKPROPAGATION]


def test_the_results_of_other_data_have_a_name_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"images": {"choices": image_data.NAMES}, "batch": {"type": int}}
    for data, expected in (("", "images"), ("digits", "images"), ("mnist", "images-mnist")):
        chosen = ["--images", data] if data else []
        monkeypatch.setattr(sys, "argv", ["images", "--output", str(tmp_path), "--batch", "3", *chosen])
        run = begin("images", None, **options)
        assert run.of(run.arguments.images, "digits") == (data or "digits")
        assert run.with_arguments(make_dataclass("Size", ["batch"])(16), "batch").batch == 3
        run.save({}, "| a table |")
        assert (tmp_path / f"{expected}.json").is_file()
    assert list(report.read(tmp_path)) == ["images", "images-mnist"]


def test_the_page_is_made_of_the_results() -> None:
    assert report.README.read_text() == report.page(report.read(RESULTS), RESULTS)


def test_methods_train_on_the_same_batches() -> None:
    def losses(row: str, seed: int) -> list[float]:
        torch.manual_seed(0)
        solve = fixed("midpoint", 3).solve(row)

        def loss(field: Field) -> Tensor:
            return solve(field, torch.randn(5, 3), torch.tensor([0.0, 1.0]))[-1].square().mean()

        return train(Field(3), loss, 4, label=row, seed=seed, learning_rate=0.1)[1]

    expected = losses(BACKPROPAGATION, seed=3)
    for row in METHODS:
        assert losses(row, seed=3) == pytest.approx(expected, rel=1e-2 if row == CONTINUOUS else 1e-4)
    assert losses(BACKPROPAGATION, seed=4) != expected


# The methods


class Field(VectorField):
    """Depends on time; of a tensor, or of a tuple with a part that is driven."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(size, 8), nn.Tanh(), nn.Linear(8, size))

    def forward(self, t: Tensor, y: Any) -> Any:
        if isinstance(y, tuple):
            return self(t, y[0]), y[0].sum(-1) * y[1]
        return 2 * torch.cos(3 * t) * self.layers(y)


SOLVERS = [
    *(adaptive(method, 1e-3, 1e-5) for method in ("dopri5", "dopri8", "bosh3")),
    *(fixed(method, 5) for method in ("euler", "midpoint", "rk4")),
    *(fixed(method, 4) for method in ("bosh3", "dopri5")),
]


@settings(max_examples=25)
@given(st.sampled_from(SOLVERS), st.integers(2, 5), st.booleans(), st.integers(0, 1000))
def test_all_but_one_are_exact(solver: Solver, outputs: int, is_tuple: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    fields = nn.ModuleList(Field(3) for _ in range(2))
    x = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    inner = torch.rand(outputs - 2, generator=generator, dtype=torch.float64).sort().values
    times = torch.cat([torch.zeros(1), inner, torch.ones(1)]).double()

    def loss(fields: nn.ModuleList, solve: Solve) -> Tensor:
        y = (x, x[:, 0]) if is_tuple else x
        total = torch.zeros(())
        for field in fields:
            found = solve(field, y, times)
            parts = found if is_tuple else (found,)
            total = total + sum(part.square().mean() for part in parts)
            y = tuple(part[-1] for part in parts) if is_tuple else found[-1]
        return total

    gradients = {row: Iteration(fields, loss, solver.solve(row), torch.float64).gradient() for row in METHODS}
    for row in EXACT:
        assert relative_error(gradients[row], gradients[BACKPROPAGATION]) <= 1e-12, row
    assert relative_error(gradients[CONTINUOUS], gradients[BACKPROPAGATION]) > 1e-12


def test_a_method_whose_steps_do_not_stand_alone_is_refused() -> None:
    solve = adaptive("adaptive_heun", 1e-3, 1e-5).solve(PER_STEP)
    with pytest.raises(ValueError, match="adaptive_heun"):
        solve(Field(3), torch.ones(2, 3), torch.tensor([0.0, 1.0]))


# Tabular data: files as the MAF repository has them


def random(*shape: int) -> Any:
    return np.random.default_rng(0).normal(size=shape)


@settings(max_examples=20)
@given(count=st.integers(20, 200))
def test_miniboone(tmp_path_factory: pytest.TempPathFactory, count: int) -> None:
    directory = tmp_path_factory.mktemp("maf")
    (directory / "miniboone").mkdir()
    data = random(count, 43) * 3 + 5
    np.save(directory / "miniboone" / "data.npy", data)

    table, line = tabular_data.load("miniboone", directory)
    assert not table.is_standin
    assert "stand-in" not in line
    parts = table.train, table.validation, table.test
    test = count // 10
    validation = (count - test) // 10
    assert [len(part) for part in parts] == [count - test - validation, validation, test]
    seen = np.vstack(parts[:2]).astype(float)
    assert np.allclose(seen.mean(0), 0, atol=1e-6)
    assert np.allclose(seen.std(0), 1, atol=1e-5)
    expected = (data - data[: count - test].mean(0)) / data[: count - test].std(0)
    assert np.allclose(np.vstack(parts), expected, atol=1e-5)  # in the order of the file
    assert all(part.dtype == np.float32 for part in parts)


def test_power(tmp_path: Path) -> None:
    (tmp_path / "power").mkdir()
    data = random(100, 8) * 100
    np.save(tmp_path / "power" / "data.npy", data)
    table = tabular_data.power(tmp_path)
    rows = np.vstack([table.train, table.validation, table.test])
    assert [len(part) for part in (table.train, table.validation, table.test)] == [81, 9, 10]
    order = np.arange(100)
    np.random.RandomState(42).shuffle(order)
    kept = data[order][:, [0, 2, 4, 5, 6, 7]]
    # Undo the standardization by the last column, which has no noise, then look at the noise of the others.
    seen = kept[:90]
    assert np.allclose(rows[:, 5], (kept[:, 5] - seen[:, 5].mean()) / seen[:, 5].std(), atol=1e-5)
    for column, width in enumerate([0.001, 0.01, 1, 1, 1]):
        exact = (kept[:, column] - seen[:, column].mean()) / seen[:, column].std()
        assert abs(rows[:, column] - exact).max() <= width / seen[:, column].std() * 1.1 + 1e-5
        assert abs(rows[:, column] - exact).max() > 0


def test_hepmass(tmp_path: Path) -> None:
    folder = tmp_path / "hepmass"
    folder.mkdir()
    train, test = random(60, 5), random(12, 6)  # the test file has a column more
    train[:, 2] = np.where(train[:, 2] < 0, 0, 1)  # a discrete feature
    test[:, 2] = 1
    for name, rows, titles in (("1000_train.csv", train, 5), ("1000_test.csv", test, 6)):
        labels = np.arange(len(rows)) % 3 == 0
        lines = ["# label," + ",".join(f"f{i}" for i in range(titles))]
        lines += [f"{label:.18e}," + ",".join(f"{x:.18e}" for x in row)
                  for label, row in zip(labels, rows, strict=True)]  # fmt: skip
        (folder / name).write_text("\n".join(lines) + "\n")

    table = tabular_data.hepmass(tmp_path)
    signals, kept = train[::3], [0, 1, 3, 4]
    mean, scale = signals.mean(0), signals.std(0, ddof=1)
    assert np.allclose(np.vstack([table.train, table.validation]), ((signals - mean) / scale)[:, kept], atol=1e-5)
    assert np.allclose(table.test, ((test[::3, :5] - mean) / scale)[:, kept], atol=1e-5)
    assert len(table.validation) == 2


def test_gas(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    (tmp_path / "gas").mkdir()
    sensors = random(50, 4)
    sensors[:, 2] = 2 * sensors[:, 0] + 1e-3 * sensors[:, 2]  # a twin of the first: the first goes
    frame = pandas.DataFrame(
        np.hstack([random(50, 3), sensors]), columns=["Time", "Meth", "Eth", "S1", "S2", "S3", "S4"]
    )
    frame.to_pickle(tmp_path / "gas" / "ethylene_CO.pickle")
    table = tabular_data.gas(tmp_path)
    expected = ((sensors - sensors.mean(0)) / sensors.std(0, ddof=1))[:, 1:]
    assert np.allclose(np.vstack([table.train, table.validation, table.test]), expected, atol=1e-5)
    assert (len(table.train), len(table.validation), len(table.test)) == (41, 4, 5)


def test_bsds300(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "BSDS300").mkdir()
    parts = {"train": random(9, 63), "validation": random(4, 63), "test": random(3, 63)}
    with h5py.File(tmp_path / "BSDS300" / "BSDS300.hdf5", "w") as file:
        for name, rows in parts.items():
            file[name] = rows
    table = tabular_data.bsds300(tmp_path)
    for name, rows in parts.items():
        assert np.array_equal(getattr(table, name), rows.astype(np.float32))


@pytest.mark.parametrize(("name", "module"), [("gas", "pandas"), ("bsds300", "h5py")])
def test_a_format_says_what_to_install(name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {module}"):
        tabular_data.load(name, tmp_path)


@pytest.mark.parametrize("name", tabular_data.READERS)
def test_missing_data_have_a_stand_in(name: str, tmp_path: Path) -> None:
    module = {"gas": "pandas", "bsds300": "h5py"}.get(name)
    directory = tmp_path if module is None or importlib.util.find_spec(module) else None
    table, line = tabular_data.load(name, directory)
    assert table.is_standin
    assert "a stand-in" in line
    assert table.train.shape[1] == table.test.shape[1] == tabular_data.DIMENSIONS[name]
    assert np.array_equal(table.train, tabular_data.load(name, None)[0].train)


# Images: IDX files


def idx(array: Any, code: int) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, code, array.ndim, *array.shape)
    return header + array.astype(image_data.TYPES[code]).tobytes()


@settings(max_examples=50)
@given(
    st.sampled_from(sorted(image_data.TYPES)),
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_idx_files_are_read_as_written(
    tmp_path_factory: pytest.TempPathFactory, code: int, shape: list[int], zipped: bool, seed: int
) -> None:
    array = np.random.default_rng(seed).integers(0, 128, size=shape)
    path = tmp_path_factory.mktemp("idx") / "file"
    path.write_bytes(gzip.compress(idx(array, code)) if zipped else idx(array, code))
    found = image_data.read_idx(path)
    assert found.shape == tuple(shape)
    assert np.array_equal(found, array)


@pytest.mark.parametrize("content", [b"", b"\0\0", b"\1\0\x08\1", b"\0\0\x07\1\0\0\0\0"], ids=repr)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="not an IDX file"):
        image_data.read_idx(tmp_path / "file")


def test_a_cut_idx_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(idx(np.zeros((3, 4)), 0x08)[:-1])
    with pytest.raises(ValueError, match="11 bytes"):
        image_data.read_idx(tmp_path / "file")


@pytest.mark.parametrize(
    ("name", "folder", "separator", "zipped"),
    [
        ("mnist", ".", "-", True),
        ("mnist", "MNIST/raw", ".", False),
        ("fashion-mnist", "fashion-mnist", "-", True),
        ("fashion-mnist", "FashionMNIST/raw", "-", False),
    ],
)
@pytest.mark.parametrize("place", ["given", "installed"])
def test_images_are_found(
    name: str, folder: str, separator: str, zipped: bool, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / place
    (root / folder).mkdir(parents=True)
    monkeypatch.setattr(image_data, "DEBIAN", tmp_path / "installed")
    arrays = {}
    for part, count in (("train", 6), ("t10k", 2)):
        arrays[part] = np.random.default_rng(count).integers(0, 256, (count, 28, 28)), np.arange(count)
        for array, kind in zip(arrays[part], ("images", "labels"), strict=True):
            file = root / folder / f"{part}-{kind}{separator}idx{array.ndim}-ubyte{'.gz' if zipped else ''}"
            file.write_bytes(gzip.compress(idx(array, 0x08)) if zipped else idx(array, 0x08))

    if place == "installed" and folder == ".":
        return  # the system's directory holds one folder a data set
    images, line = image_data.load(name, tmp_path / "given")
    assert "stand-in" not in line
    assert np.array_equal(images.train[:, 0].numpy(), arrays["train"][0])
    assert np.array_equal(images.test_labels.numpy(), arrays["t10k"][1])
    assert images.levels == 256


def test_missing_images_have_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_data, "DEBIAN", tmp_path)
    images, line = image_data.load("mnist", None)
    assert "a stand-in" in line
    assert images.train.shape[1:] == (1, 28, 28)
    assert images.train.max() < images.levels


# Physical systems


@pytest.mark.parametrize("name", EQUATIONS)
def test_the_derivative_is_the_energys_gradient(name: str) -> None:
    equation = EQUATIONS[name]
    u = np.random.default_rng(0).normal(size=POINTS)
    spacing = equation.width / POINTS
    step = 1e-5
    shifted = u + step * np.eye(POINTS), u - step * np.eye(POINTS)
    gradient = (equation.energy(shifted[0]) - equation.energy(shifted[1])) / (2 * step) / spacing
    laplacian = (np.roll(u, 1) - 2 * u + np.roll(u, -1)) / spacing**2
    assert np.allclose(gradient, equation.derivative(u, laplacian), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EQUATIONS)
def test_trajectories_obey_the_laws(name: str) -> None:
    equation: Equation = EQUATIONS[name]
    (u,) = trajectories(equation, 1, 60, seed=0)
    assert u.shape == (60, POINTS)
    energy, mass = equation.energy(u), u.sum(-1)
    assert np.allclose(mass, mass[0], atol=1e-6)
    if name == "kdv":
        assert np.allclose(energy, energy[0], rtol=1e-5)
    else:
        assert (np.diff(energy) <= 1e-12).all()
    assert abs(u[-1] - u[0]).max() > 1e-3
