# SPDX-License-Identifier: BSD-3-Clause
"""examples/train_maskrcnn.py: data, evaluation, and short runs that must repeat themselves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import glimpse_ext

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
if not EXAMPLES.is_dir():
    pytest.skip("an installed package has no examples", allow_module_level=True)
torchvision = pytest.importorskip(
    "torchvision", reason="the library of the model is not installed: pip install torchvision"
)
coco_mask = pytest.importorskip("pycocotools.mask", reason="pip install pycocotools")
pytest.importorskip("skimage", reason="the photographs are scikit-image's")

sys.path.insert(0, str(EXAMPLES))
import coco_detection  # noqa: E402
import coco_photographs  # noqa: E402
import train_maskrcnn  # noqa: E402
from coco_detection import CocoDetection, Order  # noqa: E402
from maskrcnn_model import PasteToRLE  # noqa: E402

SIZE = (64, 96)
# Twelve pictures, two per process: three steps an epoch for two processes.
COUNTS = (12, 3)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "photographs"
    coco_photographs.write(folder, *COUNTS, SIZE)
    return folder


@pytest.fixture
def settings():
    """Puts back what the example sets for its process."""
    threads = torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def arguments(photographs, out, *more):
    words = (
        f"--out {out} --photos {photographs} --photo-counts 12 3 --photo-size 64 96 --device cpu "
        "--min-size 64 --max-size 96 --channels 32 --samples 16 --warmup 2 --epochs 2 --log-every 1"
    )
    return [*words.split(), *map(str, more)]


# Several runs in the processes of one launch: most of a launch is the import of libraries.
RUNS = """
import json, sys
import glimpse_ext, train_maskrcnn
from torch import distributed, use_deterministic_algorithms

use_deterministic_algorithms(True)
runs = [train_maskrcnn.parse(words) for words in json.loads(sys.argv[1])]
place = train_maskrcnn.join(runs[0])
with glimpse_ext.patch("torchvision"):
    for run in runs:
        train_maskrcnn.train(run, place)
distributed.destroy_process_group()
"""


def torchrun(processes, photographs, folder, runs):
    """Launches processes of one thread each, which do the runs: arguments by name of folder."""
    folder.mkdir(exist_ok=True)
    (folder / "runs.py").write_text(RUNS)
    words = [
        arguments(photographs, folder / name, "--threads", 1, *more) for name, more in runs.items()
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), str(folder / "runs.py"), json.dumps(words)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def alone(photographs, out, *more):
    train_maskrcnn.main(arguments(photographs, out, "--threads", "1", *more))
    return read(out)


def read(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def of(log, event):
    return [line for line in log if line["event"] == event]


def digest(log):
    return of(log, "end")[-1]["weights_sha256"]


# Data


def test_annotations_describe_their_pictures(photographs):
    kinds = set()
    for split, count in zip(("train", "val"), COUNTS, strict=True):
        dataset = CocoDetection(photographs, split, train=False)
        assert len(dataset) == count
        assert dataset.categories == [1, 3]
        for index in range(count):
            image, target = dataset[0, index]
            assert image.shape == (3, *SIZE)
            together = torch.zeros(SIZE, dtype=torch.int64)
            for annotation in dataset.coco.imgToAnns[int(target["image_id"])]:
                mask = torch.from_numpy(dataset.coco.annToMask(annotation))
                together += mask
                assert int(mask.sum()) == annotation["area"] > 0
                x, y, width, height = map(int, annotation["bbox"])
                assert int(mask[y : y + height, x : x + width].sum()) == annotation["area"]
                kinds.add((annotation["category_id"], type(annotation["segmentation"])))
            # A later thing hides an earlier one; a polygon's own pixels are those it was cut with.
            assert together.max() == 1
    assert kinds == {(1, dict), (3, dict), (3, list)}


def test_data_depend_on_the_seed_only(photographs, tmp_path):
    files = ["annotations/instances_train.json", "train/000003.png", "val/000001.png"]
    again, other = tmp_path / "again", tmp_path / "other"
    coco_photographs.write(again, *COUNTS, SIZE)
    coco_photographs.write(other, *COUNTS, SIZE, seed=1)
    for file in files:
        assert (again / file).read_bytes() == (photographs / file).read_bytes()
        assert (other / file).read_bytes() != (photographs / file).read_bytes()
    coco_photographs.write(again, *COUNTS, SIZE)
    with pytest.raises(SystemExit, match="holds another data set"):
        coco_photographs.write(again, *COUNTS, SIZE, seed=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "other"]


def test_training_targets(tmp_path):
    """Crowds, boxes without a pixel and pictures without anything are not trained on."""
    polygon = [[2.0, 2, 8, 2, 8, 6, 2, 6]]
    crowd = {"size": [10, 12], "counts": [60, 20, 40]}
    rows = [
        (1, 7, polygon, [2, 2, 6, 4], 0),
        (1, 90, crowd, [6, 0, 2, 10], 1),
        (2, 7, polygon, [2, 2, 0, 4], 0),
        (2, 7, crowd, [6, 0, 2, 10], 1),
        (3, 90, polygon, [2, 2, 6, 4], 0),
    ]
    names = ("image_id", "category_id", "segmentation", "bbox", "iscrowd")
    annotations = [
        {"id": i + 1, "area": 24, **dict(zip(names, row, strict=True))}
        for i, row in enumerate(rows)
    ]
    images = [{"id": i, "file_name": f"{i}.png", "height": 10, "width": 12} for i in (1, 2, 3, 4)]
    categories = [{"id": i, "name": str(i)} for i in (7, 90)]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "some").mkdir()
    (tmp_path / "annotations/instances_some.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    pixels = torch.arange(120, dtype=torch.uint8).reshape(1, 10, 12).expand(3, -1, -1).contiguous()
    for image in images:
        torchvision.io.write_png(pixels, str(tmp_path / "some" / image["file_name"]))
    dataset = CocoDetection(tmp_path, "some", train=True)
    assert dataset.ids == [1, 3]
    assert len(CocoDetection(tmp_path, "some", train=False)) == 4
    mirrored = set()
    for epoch in range(8):
        image, target = dataset[epoch, 1]
        assert target["labels"].tolist() == [2]
        box = target["boxes"][0].int().tolist()
        flipped = bool(image[0, 0, 0] > image[0, 0, 1])
        mirrored.add(flipped)
        assert box == ([4, 2, 10, 6] if flipped else [2, 2, 8, 6])
        inside = target["masks"][0, box[1] : box[3], box[0] : box[2]]
        assert int(inside.sum()) == int(target["masks"].sum()) == 24
        torch.testing.assert_close(dataset[epoch, 1][0], image, rtol=0, atol=0)
    assert mirrored == {False, True}


def test_order_of_pictures():
    def batches(rank, world, epoch=0, first=0):
        order = Order(26, 2, rank, world, seed=5)
        order.epoch, order.first = epoch, first
        made = list(order)
        assert len(made) == len(order)
        return made

    ranks = [batches(rank, 3) for rank in range(3)]
    assert [len(made) for made in ranks] == [4, 4, 4]
    seen = [index for made in ranks for batch in made for _, index in batch]
    assert len(set(seen)) == len(seen) == 24
    assert batches(1, 3, first=3) == ranks[1][3:]
    assert {epoch for batch in batches(0, 1, epoch=4) for epoch, _ in batch} == {4}
    other = [index for batch in batches(0, 1, epoch=1) for _, index in batch]
    assert other != [index for batch in batches(0, 1) for _, index in batch]
    with pytest.raises(SystemExit, match="not one batch"):
        Order(5, 2, 0, 3, 0)


@pytest.mark.parametrize("count", [1, 2, 7, 9])
def test_shares_of_the_evaluation(count):
    shares = [coco_detection.shares(count, rank, 3) for rank in range(3)]
    assert len({len(share) for share in shares}) == 1
    assert {index for share in shares for [(_, index)] in share} == set(range(count))


# Evaluation


def detections(dataset):
    """What a fair detector might find: boxes and 28×28 masks of the truth, a little off."""
    random = torch.Generator().manual_seed(0)
    for index in range(len(dataset)):
        _, target = dataset[0, index]
        rows = dataset.coco.imgToAnns[int(target["image_id"])]
        boxes = torch.tensor([row["bbox"] for row in rows])
        boxes[:, 2:] += boxes[:, :2]
        boxes += 3 * torch.randn(boxes.shape, generator=random)
        masks = torch.stack([torch.from_numpy(dataset.coco.annToMask(row)) for row in rows])
        numbered = torch.cat([torch.arange(len(boxes))[:, None], boxes], 1)
        masks = glimpse_ext.roi_align(masks[:, None].float(), numbered, 28, aligned=True)
        masks = (masks + 0.2 * torch.randn(masks.shape, generator=random)).clamp(0, 1)
        labels = torch.tensor([dataset.labels[row["category_id"]] for row in rows])
        scores = torch.rand(len(rows), generator=random)
        yield target, {"boxes": boxes, "labels": labels, "scores": scores, "masks": masks}


class Replay(torch.nn.Module):
    """Detections that are known, through the transform of the example."""

    def __init__(self, results, method):
        super().__init__()
        self.transform = PasteToRLE(SIZE[0], SIZE[1], [0.0], [1.0])
        self.transform.method = method
        self.results = iter(results)

    def forward(self, images):
        sizes = [tuple(image.shape[-2:]) for image in images]
        return self.transform.postprocess([dict(next(self.results)) for _ in sizes], sizes, sizes)


@pytest.mark.parametrize("method", ["detectron2", "torchvision"])
def test_precision_is_that_of_masks_pasted_in_full(photographs, method):
    dataset = CocoDetection(photographs, "val", train=False)
    batches = coco_detection.load(dataset, coco_detection.shares(len(dataset), 0, 1), 0)
    known = list(detections(dataset))
    model = Replay([result for _, result in known], method)
    found = coco_detection.detect(model, batches, dataset.categories, torch.device("cpu"))
    in_full, by_torchvision = {}, {}
    for target, result in known:
        image_id = int(target["image_id"])
        pasted = glimpse_ext.paste_masks(result["masks"], result["boxes"], SIZE, 0.5, method)
        theirs = torchvision.models.detection.roi_heads.paste_masks_in_image(
            result["masks"], result["boxes"], SIZE
        )
        for made, masks in ((in_full, pasted), (by_torchvision, theirs > 0.5)):
            made[image_id] = [
                {**row, "segmentation": coco_mask.encode(mask.byte().t().contiguous().t().numpy())}
                for row, mask in zip(found[image_id], masks[:, 0], strict=True)
            ]
    assert found == in_full, "run lengths differ"
    precision = coco_detection.average_precision(dataset.coco, found)
    assert precision == coco_detection.average_precision(dataset.coco, in_full)
    assert 0.3 < precision["mask_AP"] < 0.99
    assert 0.3 < precision["box_AP"] < 0.99
    if method == "torchvision":
        other = coco_detection.average_precision(dataset.coco, by_torchvision)
        assert precision == pytest.approx(other, abs=1e-3)


def test_precision_of_nothing(photographs):
    dataset = CocoDetection(photographs, "val", train=False)
    for found in ({}, {1: []}):
        assert set(coco_detection.average_precision(dataset.coco, found).values()) == {0.0}


# Runs


@pytest.fixture(scope="module")
def runs(photographs, tmp_path_factory):
    """Logs by name; what is repeated or resumed has other processes than what it is compared with.

    ``broken`` is saved in the middle of an epoch and ends a step later, which is lost.
    """
    folder = tmp_path_factory.mktemp("runs")
    broken = {"broken": ["--save-every", 4, "--stop-after", 5]}
    torchrun(2, photographs, folder, {"whole": [], **broken})
    assert [line["step"] for line in of(read(folder / "broken"), "step")] == [1, 2, 3, 4, 5]
    more = {
        "broken": ["--resume"],
        "again": ["--workers", 1],
        "sharded": ["--fsdp", "--stop-after", 4],
    }
    torchrun(2, photographs, folder, more)
    return {name: read(folder / name) for name in ("whole", "broken", "again", "sharded")}


def test_log_of_a_run(runs):
    assert of(runs["whole"], "start")[0]["processes"] == 2
    steps = of(runs["whole"], "step")
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in steps] == [0, 0, 0, 1, 1, 1]
    assert sum(line["loss"] for line in steps[3:]) < sum(line["loss"] for line in steps[:3])
    assert {"loss_mask", "loss_classifier", "seconds_per_step", "lr"} <= steps[0].keys()
    evaluations = of(runs["whole"], "evaluation")
    assert [line["step"] for line in evaluations] == [3, 6]
    assert {"box_AP", "mask_AP", "mask_AP50"} <= evaluations[0].keys()


def test_a_second_run_has_the_same_weights(runs):
    """Also if other processes load the pictures."""
    assert digest(runs["again"]) == digest(runs["whole"])


def test_an_interrupted_run_goes_on_to_the_same_weights(runs):
    assert [line["step"] for line in of(runs["broken"], "step")] == [1, 2, 3, 4, 5, 5, 6]
    assert digest(runs["broken"]) == digest(runs["whole"])


def test_sharded_weights_learn_alike(runs):
    losses = [[line["loss"] for line in of(runs[name], "step")] for name in ("sharded", "whole")]
    # Soon after, a last bit decides which proposals are kept.
    assert losses[0] == pytest.approx(losses[1][:4], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "more"), [(3, []), (2, ["--fsdp"])], ids=str)
def test_interrupted_runs(photographs, tmp_path, processes, more):
    """Of three processes, the order of whose sums shows; of sharded weights."""
    middle = {3: 3, 2: 4}[processes]
    broken = ["--save-every", middle, "--stop-after", middle + 1, *more]
    torchrun(processes, photographs, tmp_path, {"whole": more, "broken": broken})
    torchrun(processes, photographs, tmp_path, {"broken": ["--resume", *more]})
    assert digest(read(tmp_path / "broken")) == digest(read(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.usefixtures("settings")
def test_a_killed_run(photographs, tmp_path):
    """Killed without notice, at any moment after a checkpoint."""
    whole = alone(photographs, tmp_path / "whole", "--save-every", 1)
    out = tmp_path / "killed"
    words = [*arguments(photographs, out, "--threads", 1, "--save-every", 1)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(EXAMPLES / "train_maskrcnn.py"), *words]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not of(read(out), "end")
    assert digest(alone(photographs, out, "--save-every", 1, "--resume")) == digest(whole)


@pytest.mark.usefixtures("settings")
def test_bfloat16_through_our_operators(photographs, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("torchvision's own operator was called")

    monkeypatch.setattr(torch.ops.torchvision, "roi_align", refuse)
    more = ("--amp", "--epochs", 1, "--batch", 6, "--pictures")
    log = alone(photographs, tmp_path / "run", *more)
    assert [line["step"] for line in of(log, "step")] == [1, 2]
    picture = torchvision.io.decode_image(str(tmp_path / "run/pictures/step_000002.png"))
    assert picture.shape[1] > SIZE[0]
    assert picture.float().std() > 20


@pytest.mark.usefixtures("settings")
def test_what_is_not_the_same_run_is_refused(photographs, tmp_path):
    more = ("--batch", 4, "--epochs", 1, "--save-every", 1, "--stop-after", 2)
    alone(photographs, tmp_path, *more)
    with pytest.raises(SystemExit, match="--resume goes on from it"):
        alone(photographs, tmp_path, *more)
    with pytest.raises(SystemExit, match=r"of another run: lr=0.001 \(now 0.1\)"):
        alone(photographs, tmp_path, *more, "--resume", "--lr", 0.1)
    assert list(tmp_path.glob("*.unfinished")) == []


@pytest.mark.usefixtures("settings")
def test_sharding_is_refused_where_it_cannot_be(photographs, tmp_path, monkeypatch):
    def missing(*_, **__):
        raise RuntimeError("no reduce_scatter")

    monkeypatch.setattr(torch.distributed, "reduce_scatter_tensor", missing)
    with pytest.raises(SystemExit, match="--fsdp: gloo cannot shard here: no reduce_scatter"):
        alone(photographs, tmp_path, "--fsdp")


@pytest.mark.slow
@pytest.mark.usefixtures("settings")
@pytest.mark.parametrize("amp", [(), ("--amp",)], ids=["float32", "bfloat16"])
def test_compiled(photographs, tmp_path, amp):
    more = ("--epochs", 1, "--batch", 4, *amp)
    runs = {
        name: alone(photographs, tmp_path / name, *more, *extra)
        for name, extra in (("eager", ()), ("compiled", ("--compile",)), ("again", ("--compile",)))
    }
    losses = {name: [line["loss"] for line in of(log, "step")] for name, log in runs.items()}
    # In bfloat16 the first step already leaves other weights, and losses part.
    alike = slice(1) if amp else slice(None)
    expected = pytest.approx(losses["eager"][alike], rel=0.05 if amp else 1e-3)
    assert losses["compiled"][alike] == expected
    assert digest(runs["compiled"]) == digest(runs["again"])
