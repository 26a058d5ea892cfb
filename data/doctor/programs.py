"""What is tried of each library that can be there and not work: programs that fill `facts`.

Invariant: each needs the library that it is named after and no more; a few milliseconds of work behind the import.
Exercised by: `stillhouse doctor`.
"""

TORCH = """
import torch
assert float(torch.ones(8, 8).mm(torch.ones(8, 8)).sum()) == 512
facts.update(built_for=torch.version.cuda, threads=torch.get_num_threads(), cuda=torch.cuda.is_available())
facts["devices"] = []
if facts["cuda"]:
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        facts["devices"].append(f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}")
    assert float(torch.ones(8, device="cuda").sum()) == 8
"""

TORCHAUDIO = """
import torch, torchaudio
from torchaudio.compliance.kaldi import fbank
assert fbank(torch.zeros(1, 16000), num_mel_bins=80).shape[1] == 80
"""

DRIVER = """
import ctypes
try:
    driver = ctypes.CDLL("libcuda.so.1")
except OSError:
    driver = None
facts.update(there=driver is not None, devices=0)
if driver is not None:
    number = ctypes.c_int()
    facts["init"] = driver.cuInit(0)
    if not driver.cuDriverGetVersion(ctypes.byref(number)):
        facts["version"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
    if not facts["init"] and not driver.cuDeviceGetCount(ctypes.byref(number)):
        facts["devices"] = number.value
"""

NUMBA = """
import numba, numpy
@numba.njit(parallel=True)
def total(x):
    s = 0.0
    for i in numba.prange(len(x)):
        s += x[i]
    return s
assert total(numpy.ones(64)) == 64
facts.update(layer=numba.threading_layer(), threads=numba.get_num_threads())
"""

NUMBA_CUDA = """
import numpy
from numba import cuda
@cuda.jit
def seven(x):
    x[0] = 7
facts["available"] = bool(cuda.is_available())
if facts["available"]:
    x = numpy.zeros(1)
    seven[1, 1](x)
    assert x[0] == 7
"""

ZARR = """
import numpy, zarr
from zarr.storage import MemoryStore
x = numpy.arange(256, dtype="float16").reshape(128, 2)
a = zarr.create_array(MemoryStore(), shape=x.shape, dtype=x.dtype, chunks=(64, 2), shards=(128, 2), compressors=None)
a[:] = x
assert (a[:] == x).all()
"""

CRC32C = """
import google_crc32c
assert google_crc32c.value(b"123456789") == 0xE3069283
facts["implementation"] = google_crc32c.implementation
"""

SOUNDFILE = """
import io, numpy, soundfile
facts.update(libsndfile=soundfile.__libsndfile_version__, formats=sorted(soundfile.available_formats()))
for kind in ("WAV", "FLAC", "OGG"):
    file = io.BytesIO()
    soundfile.write(file, numpy.zeros(1600), 16000, format=kind)
    file.seek(0)
    assert len(soundfile.read(file)[0]) == 1600, kind
"""

H5PY = """
import h5py
facts["hdf5"] = h5py.version.hdf5_version
"""

SENTENCEPIECE = """
import sentencepiece
sentencepiece.SentencePieceProcessor()
"""

TRANSFORMERS = """
from transformers import AutoModel, AutoTokenizer
"""

# By the name of the distribution; of all others the import is tried
OF = {
    "torch": TORCH,
    "torchaudio": TORCHAUDIO,
    "numba": NUMBA,
    "zarr": ZARR,
    "google-crc32c": CRC32C,
    "soundfile": SOUNDFILE,
    "h5py": H5PY,
    "sentencepiece": SENTENCEPIECE,
    "transformers": TRANSFORMERS,
}
