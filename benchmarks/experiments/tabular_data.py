"""POWER, GAS, HEPMASS, MINIBOONE and BSDS300, from the files of the MAF repository and preprocessed as it does.

(Papamakarios, Pavlakou, Murray, Masked Autoregressive Flow for Density Estimation, NeurIPS 2017; the files are the
`data.tar.gz` that it links to.) Below the directory that is given:

    power/data.npy   miniboone/data.npy                NumPy
    hepmass/1000_train.csv   hepmass/1000_test.csv     CSV with a line of names
    gas/ethylene_CO.pickle                             a pickled pandas.DataFrame: needs pandas
    BSDS300/BSDS300.hdf5                               HDF5: needs h5py
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Table:
    """A data set in float32, one example a row."""

    train: Array
    validation: Array
    test: Array
    is_standin: bool = False


def power(directory: Path) -> Table:
    generator = np.random.RandomState(42)
    data = np.load(directory / "power" / "data.npy")
    generator.shuffle(data)
    data = np.delete(data, [1, 3], axis=1)  # reactive power, intensity
    count = len(data)
    # Uniform noise of each measurement's resolution; the last column, the time of day, has none.
    noise = [0.01 * generator.rand(count, 1), 0.001 * generator.rand(count, 1), generator.rand(count, 3)]
    voltage, active, meters = noise
    return _standardized(*_split(data + np.hstack([active, voltage, meters, np.zeros((count, 1))])))


def gas(directory: Path) -> Table:
    frame = _needs("pandas", "GAS").read_pickle(directory / "gas" / "ethylene_CO.pickle")
    data = frame.drop(columns=["Meth", "Eth", "Time"]).to_numpy(float)
    while True:  # of columns that are nearly the same, one is kept
        twins = (np.corrcoef(data, rowvar=False) > 0.98).sum(1) > 1
        if not twins.any():
            break
        data = np.delete(data, int(np.argmax(twins)), axis=1)
    data = (data - data.mean(0)) / data.std(0, ddof=1)
    return _table(*_split(data))


def hepmass(directory: Path) -> Table:
    def signals(name: str, columns: int | None = None) -> Array:
        path = directory / "hepmass" / name
        with path.open() as file:
            columns = columns or sum(bool(title.strip()) for title in file.readline().split(","))
        # The test file has a column more than the training file, which is left out.
        data = np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(columns), ndmin=2)
        return data[data[:, 0] == 1][:, 1:]

    train = signals("1000_train.csv")
    test = signals("1000_test.csv", train.shape[1] + 1)
    mean, scale = train.mean(0), train.std(0, ddof=1)
    train, test = (train - mean) / scale, (test - mean) / scale
    # Discrete columns go. The repository means those with a value that occurs often, and looks at the smallest only;
    # the 21 dimensions that everybody reports on are what that leaves.
    kept = [column for column in range(train.shape[1]) if (train[:, column] == train[:, column].min()).sum() <= 5]
    train, test = train[:, kept], test[:, kept]
    count = int(0.1 * len(train))
    return _table(train[:-count], train[-count:], test)


def miniboone(directory: Path) -> Table:
    return _standardized(*_split(np.load(directory / "miniboone" / "data.npy")))


def bsds300(directory: Path) -> Table:
    with _needs("h5py", "BSDS300").File(directory / "BSDS300" / "BSDS300.hdf5", "r") as file:
        return _table(*(file[part][:] for part in ("train", "validation", "test")))


def _split(data: Array) -> tuple[Array, Array, Array]:
    """The last tenth is the test set, the last tenth of the rest the validation set."""
    count = int(0.1 * len(data))
    rest, test = data[:-count], data[-count:]
    count = int(0.1 * len(rest))
    return rest[:-count], rest[-count:], test


def _standardized(train: Array, validation: Array, test: Array) -> Table:
    seen = np.vstack([train, validation])
    mean, scale = seen.mean(0), seen.std(0)
    return _table(*((part - mean) / scale for part in (train, validation, test)))


def _table(*parts: Array) -> Table:
    return Table(*(np.ascontiguousarray(part, np.float32) for part in parts))


def _needs(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ImportError(f"{name} comes in a format that needs {module}: pip install {module}") from None


READERS: dict[str, Callable[[Path], Table]] = {
    "miniboone": miniboone,
    "gas": gas,
    "power": power,
    "hepmass": hepmass,
    "bsds300": bsds300,
}
DIMENSIONS = {"miniboone": 43, "gas": 8, "power": 6, "hepmass": 21, "bsds300": 63}
CLUSTERS = 5  # of a stand-in


def standin(name: str, count: int = 20_000) -> Table:
    """Data of the same dimension: a mixture of Gaussians with random means and covariances, standardized."""
    size = DIMENSIONS[name]
    generator = np.random.default_rng(size)
    means = generator.normal(size=(CLUSTERS, size)) * 2
    factors = generator.normal(size=(CLUSTERS, size, size)) / np.sqrt(size)
    labels = generator.integers(CLUSTERS, size=count)
    data = means[labels] + 0.1 * generator.normal(size=(count, size))
    for cluster, factor in enumerate(factors):
        mine = labels == cluster
        data[mine] += generator.normal(size=(mine.sum(), size)) @ factor
    table = _standardized(*_split(data))
    return Table(table.train, table.validation, table.test, is_standin=True)


def load(name: str, directory: Path | None) -> tuple[Table, str]:
    """The data, or their stand-in if the files are not there; and a line that says which."""
    if directory is not None:
        try:
            table = READERS[name](directory)
        except FileNotFoundError as missing:
            return standin(name), f"{name}: no {missing.filename}; a stand-in: {_described(name)}"
        return table, f"{name}: {len(table.train)} training examples from {directory}"
    return standin(name), f"{name}: no --data directory; a stand-in: {_described(name)}"


def _described(name: str) -> str:
    return f"{CLUSTERS} Gaussians in {DIMENSIONS[name]} dimensions"
