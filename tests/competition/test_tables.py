"Parquet files are read without pyarrow's threads: pyarrow 26.0.1 aborts some processes at their end that started them."
import ast
import subprocess
import sys

import pandas as pd
from conftest import ROOT

from rsnape_kit.competition.tables import read_parquet

COUNT = """
import os, sys
import pandas as pd
from rsnape_kit.competition.tables import read_parquet
threads = lambda: len(os.listdir("/proc/self/task"))
start = threads()
read_parquet(sys.argv[1])
ours = threads()
pd.read_parquet(sys.argv[1])
print(ours - start, threads() - start)
"""


def test_reading_starts_no_thread(tmp_path):
    pd.DataFrame({"a": range(1000), "b": ["x"] * 1000}).to_parquet(tmp_path / "table.parquet")
    done = subprocess.run([sys.executable, "-c", COUNT, tmp_path / "table.parquet"], capture_output=True, text=True,
                          cwd=ROOT, check=True)
    ours, of_pandas = map(int, done.stdout.split())
    assert ours == 0 < of_pandas


def test_the_table_is_that_of_pandas(tmp_path):
    index = pd.MultiIndex.from_product([["s1", "s2"], ["a", "b"]], names=["study", "slice"])
    table = pd.DataFrame({"x": [1., None, 3., 4.], "name": ["a", None, "", "ü"], "n": [1, 2, 3, 4]}, index)
    table.attrs = {"made by": "nobody"}
    table.to_parquet(tmp_path / "table.parquet")
    for columns in (None, ["n"]):
        expected = pd.read_parquet(tmp_path / "table.parquet", columns=columns)
        pd.testing.assert_frame_equal(read_parquet(tmp_path / "table.parquet", columns), expected, check_exact=True)
        assert read_parquet(tmp_path / "table.parquet", columns).attrs == expected.attrs == table.attrs


def test_every_parquet_file_of_the_library_is_read_that_way():
    calls = [(path.name, ast.unparse(node.func)) for path in (ROOT / "rsnape_kit").rglob("*.py")
             for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls if call[1] in ("pd.read_parquet", "pq.read_table", "pq.read_pandas")]
    assert sum(function.endswith("read_parquet") for _, function in calls) >= 5
