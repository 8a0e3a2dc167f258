"""Memory as measured: threads that end, peaks that stay in their phase, GPUs that are not here."""

import pickle
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lorabook import memory
from lorabook.errors import HardwareError
from lorabook.memory import GB, MemoryLog, MemoryTimeline, memory_now, memory_snapshot
from lorabook.pictures import plot_timeline
from lorabook.train.probe import MemoryCallback


def threads():
    "How many threads are sampling."
    return sum(thread.name == memory._THREAD for thread in threading.enumerate())


class FakeGPUs:
    "What `torch.cuda` and `torch.xpu` say about memory, of as many GPUs as `used` has numbers."

    def __init__(self, monkeypatch, kind, *used):
        self.used, self.peaks, self.context = list(used), list(used), [0]
        module = getattr(torch, kind)
        for other in ("cuda", "xpu"):
            monkeypatch.setattr(getattr(torch, other), "is_available", lambda k=other: k == kind)
        names = "device_count get_device_properties memory_stats mem_get_info"
        for name in f"{names} reset_peak_memory_stats current_device".split():
            monkeypatch.setattr(module, name, getattr(self, name))

    def use(self, i, size):
        "Make GPU `i` hold `size` bytes."
        self.used[i], self.peaks[i] = size, max(self.peaks[i], size)

    def device_count(self):
        return len(self.used)

    def current_device(self):
        return 0

    def get_device_properties(self, i):
        return SimpleNamespace(name="Card", total_memory=24 * GB)

    def memory_stats(self, i):
        if not self.peaks[i]:
            return {}  # as torch has it before the first use
        keys = "allocated_bytes.all.current allocated_bytes.all.peak reserved_bytes.all.current"
        return dict(zip(keys.split(), (self.used[i], self.peaks[i], self.peaks[i] + GB)))

    def mem_get_info(self, i):
        self.context.append(i)
        return 24 * GB - self.used[i], 24 * GB

    def reset_peak_memory_stats(self, i):
        self.peaks[i] = self.used[i]


@pytest.fixture
def readings(monkeypatch):
    "Bytes that the only device is to say it holds, one after the other; then the last for ever."

    def play(*sizes):
        rest = list(sizes)

        def read():
            used = rest.pop(0) if len(rest) > 1 else rest[0]
            return [dict(name="D", allocated=used, peak=used, reserved=2 * used, total=1000)]

        monkeypatch.setattr(memory, "_read_devices", read)

    return play


def peaks(timeline):
    "Phase -> peak."
    return {row["phase"]: row["peak"] for row in timeline.rows}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, MemoryError])
def test_the_thread_ends_with_the_block(error):
    timeline = MemoryTimeline(interval=0.01)
    with pytest.raises(error), timeline:
        assert threads() == 1
        raise error
    assert (threads(), memory._RUNNING) == (0, [])
    assert [row["phase"] for row in timeline.rows] == [f"until {error.__name__}"]
    pickle.dumps(timeline)


def test_a_timeline_in_another_and_in_itself():
    with MemoryTimeline(interval=0.01) as outer:
        with MemoryTimeline(interval=0.01) as inner, outer:
            assert threads() == 2
            inner.mark("inner")
        assert threads() == 1
        before = len(outer.samples)
        time.sleep(0.1)
        assert len(outer.samples) > before
        outer.mark("outer")
    assert threads() == 0
    assert (list(peaks(outer)), list(peaks(inner))) == (["outer"], ["inner"])


def test_a_timeline_can_go_on():
    timeline, spent = MemoryTimeline(interval=0.01), []
    for phase in "one", "two":
        began = time.monotonic()
        with timeline:
            time.sleep(0.03)
            timeline.mark(phase)
        spent.append(time.monotonic() - began)
        time.sleep(0.1)
    pairs = zip(timeline.rows, spent, strict=True)
    assert all(0.03 <= row["seconds"] <= most for row, most in pairs)
    seconds = [sample.seconds for sample in timeline.samples]
    assert seconds == sorted(seconds) and seconds[-1] > 0.1


def test_an_allocation_counts_in_its_phase_only(fresh):
    result = fresh("""
import time, torch
from lorabook.memory import MemoryLog
with MemoryLog(interval=0.01) as log:
    log.mark("before")
    block = torch.ones(50_000_000)
    time.sleep(0.1)
    del block
    log.mark("during")
    time.sleep(0.05)
    log.mark("after")
print(*(row[key] for row in log.rows for key in ("allocated", "peak")), log.peak)
""")
    assert not result.returncode, result.stderr
    start, _, end, during, _, after, peak = map(int, result.stdout.split())
    assert 195e6 < during - start < 215e6
    assert abs(end - start) < 10e6 and after - start < 10e6
    assert peak == during


def test_a_phase_of_50_ms_has_its_peak(fresh):
    result = fresh("""
import time, torch
from lorabook.memory import MemoryTimeline
with MemoryTimeline() as timeline:
    for i in range(10):
        block = torch.ones(50_000_000)  # 200 MB; to fill them takes a while
        timeline.mark("before")
        time.sleep(0.05)
        del block
        timeline.mark(f"short {i}")
print(*(row["peak"] - row["allocated"] for row in timeline.rows if row["phase"] != "before"))
""")
    assert not result.returncode, result.stderr
    freed = list(map(int, result.stdout.split()))
    assert len(freed) == 10 and all(190e6 < size < 210e6 for size in freed), freed


def test_how_often_it_reads(monkeypatch):
    FakeGPUs(monkeypatch, "cuda", GB)  # counts the peak itself
    assert MemoryLog().interval == 0.1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert MemoryLog().interval == 0.02 and MemoryTimeline(interval=3).interval == 3


def test_a_mapped_file_is_not_in_use(tmp_path):
    path = tmp_path / "file"
    np.ones(25_000_000, np.float32).tofile(path)
    before = memory_now()[0]
    mapped = np.memmap(path, np.float32, "r")
    assert mapped.sum() == mapped.size
    after = memory_now()[0]
    assert after["reserved"] - before["reserved"] > 80e6
    assert after["allocated"] - before["allocated"] < 20e6


@pytest.mark.parametrize("kind, name", [("cuda", "GPU"), ("xpu", "XPU")])
def test_every_gpu_is_counted(monkeypatch, kind, name):
    gpus = FakeGPUs(monkeypatch, kind, GB, 2 * GB, 0)
    log = MemoryLog(interval=60)
    with log:
        gpus.use(1, 9 * GB)  # between two samples
        gpus.use(1, 3 * GB)
        log.mark("training")
        gpus.use(0, 4 * GB)
        log.mark("saved")
    figures = [
        (row["phase"], row["name"], row["allocated"] // GB, row["peak"] // GB) for row in log.rows
    ]
    assert figures == [
        ("training", f"{name} 0, Card", 1, 1),
        ("training", f"{name} 1, Card", 3, 9),
        ("training", f"{name} 2, Card", 0, 0),
        ("saved", f"{name} 0, Card", 4, 4),
        ("saved", f"{name} 1, Card", 3, 3),
        ("saved", f"{name} 2, Card", 0, 0),
    ]
    assert log.peak == 9 * GB
    assert len(log.table()[1]) == 4 and f"Nothing was allocated on: {name} 2, Card" in str(log)
    log.plan = SimpleNamespace(peak_bytes=10 * GB)
    head, rows = log.table()
    assert [dict(zip(head, row))["difference"] for row in rows] == ["", "-10.0%", "", ""]
    lines = [text.get_text() for text in plot_timeline(log).axes[0].texts]
    assert {f"{name} 0", f"{name} 1", "peak 9 GB"} <= set(lines) and f"{name} 2" not in lines


def test_a_gpu_that_others_use_is_not_asked(monkeypatch, capsys):
    gpus = FakeGPUs(monkeypatch, "cuda", 0, 2 * GB, 0)
    assert [row["free"] for row in memory_now()] == [24 * GB, 22 * GB, None]
    assert 2 not in gpus.context
    memory.print_gpu_memory_usage()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("GPU 1, Card: allocated 2.00 GB, reserved 3.00 GB, total 24.00 GB")
    assert lines[2].endswith("free not asked") and len(lines) == 3


def test_a_mark_inside_keeps_the_peak_outside(monkeypatch):
    gpus = FakeGPUs(monkeypatch, "cuda", GB)
    with MemoryTimeline(interval=60) as outer, MemoryTimeline(interval=60) as inner:
        gpus.use(0, 9 * GB)
        gpus.use(0, GB)
        inner.mark("one")
        inner.mark("two")
        outer.mark("all")
    assert (peaks(inner), peaks(outer)) == ({"one": 9 * GB, "two": GB}, {"all": 9 * GB})


def test_an_apple_gpu(monkeypatch):
    for module in torch.cuda, torch.xpu:
        monkeypatch.setattr(module, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name, size in dict(current_allocated=3, driver_allocated=5).items():
        monkeypatch.setattr(torch.mps, f"{name}_memory", lambda size=size: size * GB)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 16 * GB)
    sizes = dict(allocated=3, peak=3, reserved=5, total=16, free=11)
    assert memory_now() == [{"name": "Apple GPU"} | {k: v * GB for k, v in sizes.items()}]
    with MemoryLog(SimpleNamespace(peak_bytes=4 * GB)) as log:
        monkeypatch.setattr(torch.mps, "current_allocated_memory", lambda: 5 * GB)
        log.mark("first step")
    assert log.table()[1][0][-3:] == ["4.00", "5.00", "+25.0%"]


def test_a_long_timeline_is_thinned_and_keeps_its_peaks(readings):
    sizes = [*range(1000), 5000, *range(4000)]
    timeline = MemoryTimeline(limit=50)
    readings(*sizes)
    for i in range(len(sizes)):
        timeline._add(memory._read_devices())
        assert len(timeline.samples) <= 50
        if i == 500:
            timeline.mark("early")  # one reading more
    timeline.mark("late")
    assert peaks(timeline) == {"early": 501, "late": 5000}
    assert len(timeline.samples) >= 20
    assert max(sample.used[0] for sample in timeline.samples if sample.phase == "early") == 501
    assert all(sample.reserved[0] == 2 * sample.used[0] for sample in timeline.samples)


def test_nothing_grows_with_time(readings):
    readings(7)
    timeline, sizes = MemoryTimeline(limit=20), []
    for _ in range(300):
        for phase in "training", "evaluation":
            timeline._add(memory._read_devices())
            timeline.mark(phase)
        sizes.append(len(pickle.dumps(timeline)))
    assert len(timeline.samples) <= 20 and len(timeline.rows) == 2
    assert max(sizes[-100:]) <= max(sizes[:50])


def test_a_plan_on_a_cpu_is_compared_with_the_probe(monkeypatch):
    cpu = lambda used: dict(name=memory._CPU, allocated=used, peak=used, reserved=used, total=99)
    monkeypatch.setattr(memory, "_read_devices", lambda: [cpu(10 * GB)])
    log = MemoryLog(SimpleNamespace(peak_bytes=6 * GB), interval=60)
    for phase in "loaded", "probe", "training":
        log.mark(phase)
    assert (log.planned, log.measured, len(log.table()[0])) == (6 * GB, None, 6)
    log.probed = 5 * GB
    assert [row[6:] for row in log.table()[1]] == [[""] * 3, ["6.00", "5.00", "-16.7%"], [""] * 3]


def test_tensors_are_counted_to_the_byte():
    def run():
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        return second, torch.empty(100)

    assert memory.tensor_peak(run) == 6000
    with torch.profiler.profile(profile_memory=True):
        assert memory.tensor_peak(lambda: None) is None


@pytest.mark.parametrize("every, steps", [(2, 4), (3, 4), (9, 4)])
def test_the_callback_names_the_phases(readings, every, steps):
    readings(1)
    log, names = MemoryLog(), []
    log.mark = names.append
    callback, state = MemoryCallback(log), SimpleNamespace(global_step=0)
    for _ in range(2):  # a second training has a first step of its own
        callback.on_train_begin(None, state, None)
        for step in range(1, steps + 1):
            control = SimpleNamespace(should_evaluate=step % every == 0)
            callback.on_step_end(None, state, control)
            if control.should_evaluate:
                callback.on_evaluate(None, state, control)
        callback.on_train_end(None, state, control)
    between = ["training", "evaluation"] * (steps // every)
    assert names == ["first step", *between, "training"] * 2


def test_a_snapshot_is_written_whatever_happens(monkeypatch, tmp_path, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refused(HardwareError, "CUDA only"), memory_snapshot(tmp_path / "never"):
        pass
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in "_record_memory_history", "_dump_snapshot":
        note = lambda *args, name=name, **kwargs: calls.append((name, *args, *kwargs.items()))
        monkeypatch.setattr(torch.cuda.memory, name, note)
    path = tmp_path / "new" / "memory.pickle"
    with pytest.raises(MemoryError), memory_snapshot(path, 10):
        raise MemoryError
    assert path.parent.is_dir()
    assert calls == [
        ("_record_memory_history", ("max_entries", 10)),
        ("_dump_snapshot", str(path)),
        ("_record_memory_history", ("enabled", None)),
    ]
