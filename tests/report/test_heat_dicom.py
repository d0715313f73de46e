"Heat maps as DICOM Segmentations, read back by pydicom and highdicom: the peak lies over the same tissue."
import numpy as np
import pydicom
import pytest
from test_structured_report import UID, write_slices

from rsnape_kit.dicom.slices import scan
from rsnape_kit.report.heat_dicom import LABEL, write_heat_dicom
from rsnape_kit.store.dicom_source import DicomSource

ROWS, COLUMNS, SIZE, SPOT = 96, 128, 32, (70, 30)


def write_study(folder, across: int, down: int):
    "Four slices of air with a dense spot, in an orientation of the file; return the source at a smaller size."
    hu = np.full((ROWS, COLUMNS), -1000, np.int16)
    hu[SPOT[0] - 4:SPOT[0] + 5, SPOT[1] - 4:SPOT[1] + 5] = 900
    write_slices(folder, 4, PatientID="p1", FrameOfReferenceUID=f"{UID}.7", Rows=ROWS, Columns=COLUMNS,
                 BitsAllocated=16, BitsStored=16, HighBit=15, PixelRepresentation=1, SamplesPerPixel=1,
                 PhotometricInterpretation="MONOCHROME2", RescaleSlope=1, RescaleIntercept=0, PixelSpacing=[.7, .7],
                 SliceThickness=2, ImageOrientationPatient=[across, 0, 0, 0, down, 0], PixelData=hu.tobytes(),
                 ImageType=["ORIGINAL", "PRIMARY", "AXIAL"])
    for place, path in enumerate(sorted(folder.glob("*.dcm"))):
        ds = pydicom.dcmread(path)
        ds.ImagePositionPatient = [0, 0, 2 * place]
        ds.save_as(path)
    return DicomSource(scan(folder), SIZE)


@pytest.mark.parametrize(("across", "down"), [(1, 1), (-1, 1), (1, -1), (-1, -1)])
def test_the_peak_lies_over_the_same_tissue(tmp_path, across, down):
    hd = pytest.importorskip("highdicom", reason="pip install highdicom")
    source = write_study(tmp_path, across, down)
    heats = {row: np.maximum(source[row] / 4. + 1000, 0) * (row + 1) for row in (1, 2)}  # the spot in the source
    path, = write_heat_dicom(tmp_path / "out", heats, source.table)
    ds, seg = pydicom.dcmread(path), hd.seg.segread(path)
    assert (ds.Modality, ds.SegmentationType, ds.PatientID) == ("SEG", "FRACTIONAL", "p1")
    assert ds.FrameOfReferenceUID == f"{UID}.7"
    assert (ds.Rows, ds.Columns, ds.NumberOfFrames, ds.StudyInstanceUID) == (ROWS, COLUMNS, 2, f"{UID}.1")
    segment, = ds.SegmentSequence
    assert segment.SegmentLabel == LABEL
    assert segment.SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "rsnape_kit"
    uids = source.table["SOPInstanceUID"].iloc[list(heats)].tolist()
    assert {uid for *_, uid in seg.get_source_image_uids()} == set(uids)
    frames = seg.get_pixels_by_source_instance(uids, combine_segments=False)[..., 0]
    for frame in frames:
        assert frame.shape == (ROWS, COLUMNS) and frame.max() == pytest.approx(1, abs=.005)
        centre = np.argwhere(frame > .9).mean(0)
        assert np.abs(centre - SPOT).max() < COLUMNS / SIZE / 2 and frame[:40].max() < .05


def test_a_file_that_cannot_be_referred_to_is_named(tmp_path):
    pytest.importorskip("highdicom", reason="pip install highdicom")
    source = write_study(tmp_path, 1, 1)
    path = source.table["path"].iloc[1]
    ds = pydicom.dcmread(path)
    del ds.SOPClassUID
    ds.save_as(path)
    with pytest.raises(ValueError, match=r"\.dcm cannot be referred to by a DICOM Segmentation"):
        write_heat_dicom(tmp_path / "out", {1: np.ones((SIZE, SIZE))}, source.table)
