import errno
import os
import threading
import time
from functools import partial

import pytest
from conftest import photograph, save, status_of

import files
import images
import pipeline
from console import ImageError, StorageError, UserError, plain_errors
from pipeline import Job, Stamp, for_each, upscale_jobs

# The loop -------------------------------------------------------------------------------------


@pytest.fixture
def jobs(tmp_path):
    return [Job(str(n), tmp_path / f"{n}.png", tmp_path / f"{n}_x4.png") for n in range(8)]


def work_on(jobs, work, **options):
    with plain_errors():
        for_each(jobs, work, "Upscaled", "out", **options)


def test_results_are_finished_in_threads_and_counted(jobs, capsys):
    main_thread, begun, finished = threading.get_ident(), [], []

    def work(job, on_progress):
        on_progress(0.5)
        begun.append(job)
        return None if job.name in "12" else partial(finish, job)

    def finish(job):
        finished.append((job, threading.get_ident() != main_thread))
        return ["reduced to 8 bits"] if job.name == "3" else None

    work_on(jobs, work, threads=3)
    printed = capsys.readouterr()
    assert begun == jobs and len(finished) == 6 and all(other for _, other in finished)
    assert printed.out.startswith("Upscaled 6 images, 2 up to date, in ")
    assert printed.out.endswith(" s: out\n") and "skipped" not in printed.out
    assert printed.err == f"{jobs[3].source}: reduced to 8 bits\n"


ONE_IMAGE = {
    "too small": ImageError("a.png: too small"),
    "Too many open files": OSError(errno.EMFILE, "Too many open files"),
    "Permission denied": PermissionError(errno.EACCES, "Permission denied", "a.png"),
    "Input/output error": OSError(errno.EIO, "Input/output error"),
    "memory": MemoryError(),
}


@pytest.mark.parametrize("late", [False, True], ids=["work", "finish"])
@pytest.mark.parametrize("word", ONE_IMAGE)
def test_one_image_costs_that_image_only_and_is_not_blamed(jobs, capsys, word, late):
    def fail(job):
        error = ONE_IMAGE[word]
        if job.name == "2":
            raise error
        return []

    def work(job, _):
        return partial(fail, job) if late else fail(job) or list

    assert status_of(partial(work_on, jobs, work, problems=["b.xyz: unknown"])) == 1
    printed = capsys.readouterr()
    foreign, line, report = printed.err.splitlines()
    assert "b.xyz" in foreign and word in line
    assert "a.png" in line if "a.png" in str(ONE_IMAGE[word]) else str(jobs[2].source) in line
    assert "remove" not in line and "delete" not in line and "folder" not in line
    assert "Upscaled 7 images, 2 skipped, in " in report and not printed.out


@pytest.mark.parametrize("error", [StorageError, ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize("late", [False, True], ids=["work", "finish"])
def test_anything_else_ends_the_run(jobs, error, late):
    begun = []

    def fail(job):
        begun.append(job)
        time.sleep(0.02)
        if job.name == "0":
            raise error

    with pytest.raises(error):
        for_each(jobs, lambda j, _: partial(fail, j) if late else fail(j), "A", "", threads=2)
    assert len(begun) < 6


def test_nothing_to_do_shows_no_bar(capsys):
    work_on([], print)
    assert capsys.readouterr().err == ""


# Stamps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_a_stamp_comes_back_from_every_format(tmp_path, suffix):
    path, pixels = tmp_path / f"a.{suffix}", photograph(0, 40)
    stamp = Stamp("0123456789abcdef", "6x6+8", "89ab/1/float32", "76543210")
    images.write_image(path, pixels, images.Photo(photograph(0, 10)), str(stamp))
    assert Stamp.read(path) == stamp
    images.write_image(path, pixels, images.Photo(photograph(0, 10)))
    assert Stamp.read(path) == Stamp()


@pytest.mark.parametrize("text", ["image.png 1234 5678 | w1", "source=1 more=2", "a=b"])
def test_a_stamp_of_another_version_is_empty(tmp_path, text):
    images.write_png(tmp_path / "a.png", photograph(0, 10), text)
    assert Stamp.read(tmp_path / "a.png") == Stamp()
    (tmp_path / "a.png").write_bytes(b"no image")
    assert Stamp.read(tmp_path / "a.png") == Stamp()


# What to upscale ------------------------------------------------------------------------------


def result(path):
    images.write_png(path, photograph(0, 8), str(Stamp("0" * 16, weights="1/1/float32")))


def found(*given, output=None, recursive=False):
    jobs, problems = upscale_jobs(given, output, "_x4.png", recursive)
    return [(job.source, job.target) for job in jobs], problems


@pytest.fixture
def album(tmp_path):
    for name in ("a.png", "deep/b.jpg", ".git/c.png", "deep/.thumbnails/d.png", "e[1].bmp"):
        save((tmp_path / name).parent, (tmp_path / name).name, photograph(0, 8))
    for name in ("notes.txt", "._a.png"):
        (tmp_path / name).write_text("no image")
    result(tmp_path / "b.png")  # whatever it is called
    return tmp_path


def test_folders_give_their_images_but_no_results(album):
    a, b, e = album / "a.png", album / "deep" / "b.jpg", album / "e[1].bmp"
    at = {each: each.with_name(f"{each.stem}_x4.png") for each in (a, b, e)}
    assert found(album) == ([(a, at[a]), (e, at[e])], [])
    assert found(album, recursive=True)[0] == [(a, at[a]), (e, at[e]), (b, at[b])]
    large = album / "large"
    assert found(album, output=large, recursive=True)[0] == [
        *((each, large / at[each].name) for each in (a, e)),
        (b, large / "deep" / "b_x4.png"),
    ]
    assert found(e)[0] == [(e, at[e])]
    assert found(album / "b.png")[0][0][0] == album / "b.png"  # named: as asked for
    assert found(a, album, a)[0] == found(album)[0]


def test_patterns_that_no_shell_expanded_are_expanded(album):
    assert [source.name for source, _ in found(album / "*.png")[0]] == ["a.png"]
    assert [source.name for source, _ in found(album / "*" / "?.jpg")[0]] == ["b.jpg"]
    (pair,), _ = found(album / "d*" / "*.jpg", output=album / "large")
    assert pair[1] == album / "large" / "b_x4.png"
    missing = album / "*.gif"
    assert found(missing)[0][0][0] == missing  # which reading will name


def test_what_a_folder_holds_in_vain_is_said(album, tmp_path):
    (album / "phone.heic").touch()
    save(album, "a.tif", photograph(1, 8))
    jobs, problems = found(album)
    assert len(jobs) == 2 and len(problems) == 2
    assert "phone.heic" in problems[0]
    assert all(name in problems[1] for name in ("a.tif", "a.png"))  # of one result
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty.*--recursive"):
        found(tmp_path / "empty")


def test_output_is_a_file_or_a_folder(album):
    a, e = album / "a.png", album / "e[1].bmp"
    assert found(a, output=album / "b.webp")[0] == [(a, album / "b.webp")]
    (album / "v1.jpg").mkdir()
    assert found(a, output=album / "v1.jpg")[0] == [(a, album / "v1.jpg" / "a_x4.png")]
    for given, output, word in ([a], "b.gif", "b.gif"), ([a, e], "b.png", "folder"):
        with pytest.raises(UserError, match=word):
            found(*given, output=album / output)


# What may go on -------------------------------------------------------------------------------


def test_another_picture_of_the_same_size_and_time_is_noticed(tmp_path):
    made, source = tmp_path / "made.png", save(tmp_path, "a.bmp", photograph(0, 20))
    images.write_png(made, photograph(0, 80), str(Stamp(files.digest(source), weights="w")))
    before = source.stat()
    pipeline.check_source(made, source, "make it again")
    save(tmp_path, "a.bmp", photograph(1, 20))
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert source.stat().st_size == before.st_size
    with pytest.raises(ImageError, match=r"made\.png.*a\.bmp; make it again"):
        pipeline.check_source(made, source, "make it again")
    save(tmp_path, "made.png", photograph(0, 80))  # of another program: nothing is known
    pipeline.check_source(made, source, "make it again")
