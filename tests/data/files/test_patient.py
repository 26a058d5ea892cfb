"""HDF5 on a full disk: the library hears of no error, and the error comes when the file is closed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from stillhouse.data.files.patient import PatientFile

CHILD = """
import gc, resource, sys
from pathlib import Path
import numpy as np
from stillhouse.data.errors import FeatureError
from stillhouse.data.features.compute import FeatureSettings
from stillhouse.data.features.settings import Variant
from stillhouse.data.features.writer import Rows, write_rows
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
rows = Rows()
for i in range(400):
    rows.add(f"u{i}", Variant(1.0), 0, np.ones((50, 80)))
try:
    write_rows(Path(sys.argv[1]), FeatureSettings(), rows)
except FeatureError as e:
    print(e)
gc.collect()
"""


@pytest.mark.parametrize("limit", [0, 5_000, 20_000, 100_000, 1_000_000, 3_199_999])
def test_features_beyond_a_limit_are_one_error_without_noise(tmp_path: Path, limit: int) -> None:
    command = [sys.executable, "-c", CHILD, str(tmp_path / "f.h5"), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        f"{tmp_path}/f.h5: cannot write: the file would be larger than allowed; raise the limit"
    )
    assert not list(tmp_path.iterdir())


def test_hdf5_reads_what_it_wrote(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(300, 80)).astype(np.float16)
    with PatientFile(tmp_path / "a.h5") as output, h5py.File(output, "w") as file:
        file["a"] = values
        file.attrs["b"] = 1
    with h5py.File(tmp_path / "a.h5") as file:
        assert np.array_equal(file["a"][()], values)
        assert file.attrs["b"] == 1


def test_close_raises_the_first_error() -> None:
    with pytest.raises(OSError, match="No space left"), PatientFile(Path("/dev/full")) as file:
        assert file.write(b"12345") == 5
        assert file.truncate(3) == 3
