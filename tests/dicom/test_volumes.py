"Volumes as slices tables: every format and orientation gives the same axial slices; masks are left out."
import gzip
import os
import struct
import sys

import numpy as np
import pandas as pd
import pytest

from rsnape_kit.dicom.decode import DicomError
from rsnape_kit.dicom.volumes import is_volume, read_volume, scan_volume, select_study
from rsnape_kit.store import DicomSource, SliceStore, build_store, describe_problems

itk = pytest.importorskip("SimpleITK", reason="reading volumes needs SimpleITK: pip install rsnape_kit[volumes]")

RNG = np.random.default_rng(0)
HU = RNG.integers(-1000, 500, (6, 16, 12)).astype(np.int16)  # z to the head, y to the back, x to the left
SPACING, ORIGIN = (.75, .5, 2.5), (-10., -20., 30.)


def image_of(hu=HU):
    image = itk.GetImageFromArray(hu)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    return image


def stack(table):
    source = DicomSource(table, size=4)
    return np.stack([source.reader(row, -1024, lambda values, *_: values) for row in source.table.itertuples()])


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".nhdr"])
@pytest.mark.parametrize("code", ["LPS", "RAS", "RAI", "SPL", "PIR", "ASL"])
def test_formats_and_orientations(tmp_path, suffix, code):
    path = tmp_path / f"case{suffix}"
    itk.WriteImage(itk.DICOMOrient(image_of(), code), path)
    table = scan_volume(path)
    np.testing.assert_array_equal(stack(table), HU)
    np.testing.assert_allclose(table.position, 30 + 2.5 * np.arange(6), atol=1e-4)
    np.testing.assert_allclose(table[["spacing_x", "spacing_y", "thickness"]], [SPACING] * 6, atol=1e-6)
    assert set(table.StudyInstanceUID) == {"case"} and not table.problem.any()


def nifti(stored, affine, slope, intercept) -> bytes:
    "A NIfTI-1 file of int16 [x, y, z], by the format's description: header, sform, voxels with x fastest."
    header = bytearray(352)
    struct.pack_into("<i", header, 0, 348)
    struct.pack_into("<8h", header, 40, 3, *stored.shape, 1, 1, 1, 1)
    struct.pack_into("<2h", header, 70, 4, 16)
    struct.pack_into("<8f", header, 76, 1, *np.linalg.norm(affine[:, :3], axis=0), 0, 0, 0, 0)
    struct.pack_into("<3f", header, 108, 352, slope, intercept)
    header[123] = 2  # millimetres
    struct.pack_into("<2h", header, 252, 0, 1)
    struct.pack_into("<12f", header, 280, *affine.ravel())
    header[344:348] = b"n+1\0"
    return bytes(header) + stored.astype("<i2").tobytes(order="F")


def test_a_nifti_written_by_hand(tmp_path):
    "NIfTI's axes run to the right, the front and the head (RAS); this one is stored from the left and the back."
    stored = ((HU + 1000) * 2).transpose(2, 1, 0)[::-1]  # x from left to right
    affine = np.array([[.75, 0, 0, -50.], [0, -.5, 0, 20.], [0, 0, 2.5, 30.]])
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(nifti(stored, affine, .5, -1000.)))
    hu, spacing, bottom = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(hu, HU)
    assert (spacing, bottom) == (SPACING, 30)


def test_a_folder_of_volumes_and_masks(tmp_path):
    for name in ("p1/ct.nii.gz", "p2/ct.nii.gz", "p2/mask.nii.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        itk.WriteImage(image_of((HU > 0).astype(np.int16) if "mask" in name else HU), tmp_path / name)
    selection = select_study(tmp_path)
    assert selection.table.StudyInstanceUID.unique().tolist() == ["p1_ct", "p2_ct"] and len(selection.table) == 12
    assert selection.left_out.SeriesInstanceUID.tolist() == ["mask"] and "no air" in selection.describe()
    assert set(select_study(tmp_path, "mask").table.StudyInstanceUID) == {"mask"}
    with pytest.raises(ValueError, match="no volume 'ct'; there are p1_ct, p2_ct, mask"):
        select_study(tmp_path, "ct")
    with pytest.raises(ValueError, match="no volume to use.*\n.*mask"):
        select_study([str(tmp_path / "p2/mask.nii.gz")])
    assert "no air" in describe_problems(DicomSource(select_study(tmp_path, "mask").table, 8))


def test_a_store_of_volumes(tmp_path):
    itk.WriteImage(image_of(RNG.integers(-1000, 500, (3, 512, 512)).astype(np.int16)), tmp_path / "case.nrrd")
    build_store(tmp_path / "case.nrrd", tmp_path / "store")
    hu = read_volume(tmp_path / "case.nrrd")[0].reshape(3, 256, 2, 256, 2)
    np.testing.assert_array_equal(SliceStore(tmp_path / "store")[:], hu.sum((2, 4)))


def test_an_unreadable_volume_is_left_out_of_a_store(tmp_path):
    for name in ("a", "b", "c"):
        itk.WriteImage(image_of(), tmp_path / f"{name}.nii")
    (tmp_path / "b.nii").write_bytes(b"no volume")
    with pytest.warns(UserWarning, match="b.nii: no readable volume.*left out: copy it again") as told:
        build_store(tmp_path, tmp_path / "store", size=8)
    store = SliceStore(tmp_path / "store")
    assert store.table.StudyInstanceUID.value_counts().to_dict() == {"a": 6, "c": 6}
    (row,) = pd.read_csv(tmp_path / "store" / "problems.csv").itertuples()
    assert row.path == str(tmp_path / "b.nii") and row.StudyInstanceUID == "b" and "no readable volume" in row.problem
    assert sum("left out" in str(each.message) for each in told) == 1
    assert select_study(tmp_path).left_out.path.tolist() == [str(tmp_path / "b.nii")]
    for name in ("a", "c"):
        (tmp_path / f"{name}.nii").write_bytes(b"")
    with pytest.raises(DicomError, match="a.nii: .*nor can any other of 3 volumes"):
        build_store([tmp_path / f"{name}.nii" for name in "abc"], tmp_path / "none", size=8)
    with pytest.raises(DicomError, match="b.nii: (?!.*nor can)"):
        build_store(tmp_path / "b.nii", tmp_path / "none", size=8)
    assert not (tmp_path / "none").exists()


def test_notes_count_all_slices_and_not_a_sample(tmp_path):
    hu = np.repeat(RNG.integers(-1000, 500, (1, 16, 12)), 40, 0).astype(np.int16)
    hu[::2] = -1000
    itk.WriteImage(image_of(hu), tmp_path / "half.nii")
    itk.WriteImage(image_of(np.abs(hu[:30]) - 200), tmp_path / "high.nii")
    text = {name: describe_problems(DicomSource(scan_volume(tmp_path / f"{name}.nii"), 4)) for name in ("half", "high")}
    assert "20 of 40 slices: all pixels are -1000 HU" in text["half"]
    assert "no air in 30 slices, the lowest value is" in text["high"]


def test_what_is_refused(tmp_path, monkeypatch):
    (tmp_path / "a.nii").write_bytes(b"no volume")
    itk.WriteImage(itk.JoinSeries([image_of(), image_of()]), tmp_path / "four.nii")
    for name, cause in (("a.nii", "no readable volume"), ("four.nii", "one 3D volume"), ("none.nii", "No such file")):
        with pytest.raises(DicomError, match=f"{name}: .*{cause}"):
            scan_volume(tmp_path / name)
    itk.WriteImage(image_of(), tmp_path / "b.nii")
    monkeypatch.setitem(sys.modules, "SimpleITK", None)
    with pytest.raises(ImportError, match=r"pip install 'rsnape_kit\[volumes\]'"):
        scan_volume(tmp_path / "b.nii")
    assert is_volume("A.NII.GZ") and not is_volume("a.dcm.gz")


def test_a_real_volume_and_its_masks_agree(real_ct):
    "The pulmonary artery of an angiography is bright: its mask, turned like the CT, finds contrast agent."
    folder = real_ct / "totalseg_cta"
    hu, artery = (read_volume(folder / f"{name}.nii.gz")[0] for name in ("ct_cropped", "pulmonary_artery"))
    assert hu.shape == artery.shape and set(np.unique(artery)) == {0, 1}
    assert hu[artery > 0].mean() > 400 > 200 > hu[artery == 0].mean()
    assert abs(hu[::-1][artery > 0].mean() - hu[artery > 0].mean()) > 100  # the wrong way round would not fit


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_truncated_nifti_is_refused(tmp_path, name):
    "ITK reads such a file with zeros in place of what is missing."
    whole, cut = tmp_path / name, tmp_path / f"cut_{name}"
    itk.WriteImage(image_of(), whole)
    data = whole.read_bytes()
    for length in (len(data) * 2 // 3, len(data) - 3, 100, 0):
        cut.write_bytes(data[:length])
        with pytest.raises(DicomError, match=r"copy.*again"):
            read_volume(cut)
    np.testing.assert_array_equal(read_volume(whole)[0], HU)


def test_volumes_with_equal_names_are_studies_of_their_own(tmp_path):
    names = ["p1/CT/a.nii.gz", "p2/CT/a.nii.gz", "b.nii", "b.mha"]
    for k, name in enumerate(names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        itk.WriteImage(image_of(HU[:k + 2]), tmp_path / name)
    sizes = select_study(tmp_path).table.groupby("StudyInstanceUID").size()
    assert sizes.to_dict() == {"p1_CT_a": 2, "p2_CT_a": 3, "b.nii": 4, "b.mha": 5}


def test_an_unreadable_volume_does_not_hide_the_others(tmp_path):
    itk.WriteImage(image_of(), tmp_path / "good.mha")
    (tmp_path / "bad.nrrd").write_bytes(b"")
    selection = select_study(tmp_path)
    assert set(selection.table.StudyInstanceUID) == {"good"}
    assert "left out: series bad, 1 file: no readable volume" in selection.describe()
    with pytest.raises(DicomError, match=r"bad\.nrrd"):
        select_study(tmp_path, "bad")


def test_a_path_that_is_not_utf8_is_refused(tmp_path):
    "SimpleITK ends the process there."
    path = os.fsdecode(os.fsencode(tmp_path) + b"/J\xfcrgen.nii")
    with open(path, "wb") as file:
        file.write(bytes(400))
    with pytest.raises(DicomError, match="not UTF-8; rename"):
        read_volume(path)
