"Ways in which the files of a study are damaged, and whether the study can still be predicted."
import os
import shutil
from pathlib import Path

import numpy as np

BROKEN = {"truncated": True, "no image": True, "no folder": None, "all broken": False, "twice": True, "one slice": True,
          "odd size": True}  # whether it is predicted; None: not even found


def break_study(kind: str, paths: list):
    "Damage the files of one study."
    first = Path(paths[0])
    if kind == "truncated":
        for path in paths[2:5]:
            os.truncate(path, 2000 + os.path.getsize(path) // 3)
    elif kind == "no image":
        first.write_bytes(b"this is a letter to the radiologist")
    elif kind == "no folder":
        shutil.rmtree(first.parent)
    elif kind == "all broken":
        for path in paths:
            Path(path).write_bytes(os.urandom(600))
    elif kind == "twice":
        shutil.copy(first, first.with_name("copy.dcm"))
    elif kind == "one slice":
        for path in paths[1:]:
            os.remove(path)
    elif kind == "odd size":
        import pydicom
        for path in paths[::2]:
            ds = pydicom.dcmread(path)
            ds.decompress() if ds.file_meta.TransferSyntaxUID.is_compressed else None
            ds.PixelData, ds.Rows, ds.Columns = np.ascontiguousarray(ds.pixel_array[:401, :333]).tobytes(), 401, 333
            ds.save_as(path)
