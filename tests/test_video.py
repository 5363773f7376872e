"""`read_video` on every kind of file: lossless videos whose frames carry their number tell which frames it returns."""
import os
import re
import struct

import av
import numpy as np
import pytest
import torch
from conftest import numbered_frames, write_video
from PIL import Image
from torchvision.transforms.v2.functional import resize

import data

# All but lossless, in groups of 12 pictures with B-frames (which x264 leaves out where it is lossless).
H264 = dict(codec="libx264rgb", pix_fmt="bgr24", qp="1", g="12", bf="3", b_strategy="0", sc_threshold="0")


def numbers(path, num_samples, rng=None):
    """The numbers that the frames of `read_video` carry; those of lossy codecs may be one value of grey off."""
    return ((data.read_video(path, num_samples, rng)[:, 0, 5, 5].int() + 1) // 2).tolist()


@pytest.mark.parametrize("t", [1, 3, 8, 32])
@pytest.mark.parametrize(("name", "options"), [
    ("video.mkv", {}),  # no number of frames in the header
    ("video.avi", {}),
    ("video.mp4", H264),
    ("h264.avi", H264),  # has no times of display
    ("opengop.mkv", H264 | {"x264-params": "open-gop=1:keyint=12:min-keyint=12:scenecut=0:b-adapt=0:bframes=3"}),
    ("video.webm", dict(codec="libvpx-vp9", pix_fmt="gbrp", lossless="1", g="10")),
    ("grey.mkv", dict(pix_fmt="gray")),
    ("10bit.mkv", dict(pix_fmt="yuv444p10le")),
    ("alpha.mkv", dict(pix_fmt="bgra")),
    ("alpha.mov", dict(codec="qtrle", pix_fmt="argb")),
])
def test_the_frames_of_the_rule_come_from_any_container_and_codec(tmp_path, name, options, t):
    path = write_video(tmp_path / name, numbered_frames(100), **options)
    video = data.read_video(path, t)
    assert (video.shape, video.dtype) == ((t, 3, 24, 32), torch.uint8)
    assert numbers(path, t) == data.sample_frames(100, t).tolist()
    assert numbers(path, t, np.random.default_rng(t)) == data.sample_frames(100, t, np.random.default_rng(t)).tolist()


def test_frames_of_a_variable_rate_count_as_frames(tmp_path):
    times = np.cumsum(np.random.default_rng(0).integers(1, 10_000, size=60))  # the file says that it lasts 4 hours
    path = write_video(tmp_path / "video.mkv", numbered_frames(60), times=times.tolist(), **H264)
    assert numbers(path, 8) == data.sample_frames(60, 8).tolist()


def test_only_what_is_needed_of_a_long_video_is_decoded(tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.mp4", numbered_frames(120), **H264)
    packets, frames = [], []

    def decode(codec, group, *options, whole=data.decode):
        packets.append(len(group))
        for number, frame in whole(codec, group, *options):
            frames.append(number)
            yield number, frame

    monkeypatch.setattr(data, "decode", decode)
    assert numbers(path, 2) == [30, 90]
    assert packets == [12, 12]  # two groups of ten
    assert frames[-1] == 90
    assert len(frames) < 2 * 7  # up to the sixth of each group, without all that no frame depends on
    with av.open(str(path)) as container:
        shown = [packet.pts for packet in container.demux(video=0) if packet.size]
    assert shown != sorted(shown)  # there are B-frames, which come behind frames that are shown later


def test_frames_that_are_only_there_to_decode_others_do_not_count(tmp_path):
    """A clip that was cut out of a longer video without coding it again: the 7 frames before time 0 are not shown."""
    whole = write_video(tmp_path / "whole.mp4", numbered_frames(24), **(H264 | {"bf": "0"}))
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.mp4"), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                shift = 7 * packet.duration
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    assert numbers(tmp_path / "cut.mp4", 17) == list(range(7, 24))


@pytest.mark.parametrize("t", [1, 8])
def test_one_frame_is_enough(tmp_path, t):
    assert numbers(write_video(tmp_path / "video.mkv", numbered_frames(1) + 10), t) == [5] * t


def test_colours_come_in_the_order_red_green_blue(tmp_path):
    frames = np.zeros((4, 16, 16, 3), np.uint8)
    frames[..., 0], frames[..., 2] = 200, 50
    assert data.read_video(write_video(tmp_path / "video.mkv", frames), 1)[0, :, 5, 5].tolist() == [200, 0, 50]


@pytest.mark.parametrize("options", [{}, H264, dict(codec="libx264", pix_fmt="yuv444p", qp="0")])
def test_odd_sizes(tmp_path, options):
    path = write_video(tmp_path / "video.mkv", numbered_frames(10, 47, 63), **options)
    assert data.read_video(path, 2).shape == (2, 3, 47, 63)


@pytest.mark.parametrize(("degrees", "corner"), [(90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1)), (0, (0, 0))])
def test_rotated_videos_are_turned_upright(tmp_path, degrees, corner):
    """Red is at the top left of the coded picture; a turn by 90 degrees, counter-clockwise, brings it to the bottom."""
    frames = np.zeros((3, 24, 32, 3), np.uint8)
    frames[:, :8, :8, 0] = 255
    path = write_video(tmp_path / "video.mp4", frames, rotation=degrees, **H264)
    video = data.read_video(path, 2)
    assert video.shape[2:] == ((32, 24) if degrees in (90, -90) else (24, 32))
    assert video[:, 0][(slice(None), *corner)].tolist() == [255, 255]
    assert video[:, 0].float().mean() == pytest.approx(255 * 64 / (24 * 32))


def write_sound(path, codec, cover=None):
    """A second of silence; with `cover`, a PNG, it is attached as the picture of the album."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.int16), format="s16", layout="mono")
        frame.rate = 44100
        if cover is not None:
            picture = container.add_stream("png", rate=1)
            picture.height, picture.width, picture.pix_fmt = *cover.shape[:2], "rgb24"
            picture.disposition = av.stream.Disposition.attached_pic
            container.mux(picture.encode(av.VideoFrame.from_ndarray(cover, format="rgb24")))
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_sound_alone_is_not_a_video_even_with_a_cover(tmp_path):
    for path in (write_sound(tmp_path / "a.mp3", "libmp3lame"),
                 write_sound(tmp_path / "b.mp3", "libmp3lame", np.zeros((32, 32, 3), np.uint8))):
        with pytest.raises(ValueError, match="it has no video stream"):
            data.read_video(path, 8)
    with av.open(str(path)) as container:
        assert container.streams.video  # there is one: the cover


def test_of_several_streams_the_video_is_read(tmp_path):
    """A small video, silence, and the larger video that players would show."""
    small, large = numbered_frames(20, 24, 32), numbered_frames(60, 48, 64)
    with av.open(str(tmp_path / "video.mkv"), "w") as container:
        streams = [container.add_stream("ffv1", rate=25), container.add_stream("libmp3lame", rate=44100),
                   container.add_stream("ffv1", rate=25)]
        for stream, frames in ((streams[0], small), (streams[2], large)):
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "bgr0"
        for stream, frames in ((streams[0], small), (streams[2], large)):
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    assert data.read_video(tmp_path / "video.mkv", 8).shape == (8, 3, 48, 64)
    assert numbers(tmp_path / "video.mkv", 8) == data.sample_frames(60, 8).tolist()


def test_large_frames_are_reduced_on_the_way(tmp_path):
    """As torchvision would do it from the whole picture."""
    smooth = resize((torch.rand(2, 3, 8, 10) * 255).byte(), [600, 750])
    path = write_video(tmp_path / "video.mkv", smooth.permute(0, 2, 3, 1).contiguous().numpy())
    video = data.read_video(path, 2, short_side=256)
    assert video.shape == (2, 3, 256, 320)
    assert (video.int() - resize(smooth, [256, 320]).int()).abs().max() <= 2
    assert data.read_video(path, 2, short_side=300).shape == (2, 3, 600, 750)  # not over twice as large


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_a_folder_of_frames_is_read_in_the_order_of_their_numbers(tmp_path, mode):
    for i, frame in enumerate(numbered_frames(12)):
        Image.fromarray(frame).convert(mode).save(tmp_path / f"frame{i}.png")
    (tmp_path / "notes.txt").touch()
    assert numbers(tmp_path, 6) == data.sample_frames(12, 6).tolist()


def damaged(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


def test_a_header_of_a_billion_frames_is_not_believed(tmp_path):
    def claim(content):
        for where in (content.index(b"avih") + 8 + 16, content.index(b"strh") + 8 + 32):
            content[where : where + 4] = struct.pack("<I", 10 ** 9)

    path = damaged(write_video(tmp_path / "video.avi", numbered_frames(40)), claim)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 10 ** 9
    assert numbers(path, 8) == data.sample_frames(40, 8).tolist()


@pytest.mark.parametrize("name", ["video.mkv", "video.avi"])
def test_a_file_that_is_cut_off_gives_the_frames_that_are_left(tmp_path, name):
    path = damaged(write_video(tmp_path / name, numbered_frames(100)), lambda content: content.__delitem__(
        slice(len(content) // 2, None)))
    assert numbers(path, 8) in [data.sample_frames(left, 8).tolist() for left in range(20, 60)]


def test_damaged_pictures_are_passed_over(tmp_path):
    """Without a group's keyframe its frames are lost or wrong; those of the other groups are still the right ones."""
    def spoil(content):
        with av.open(str(path)) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        content[packets[24].pos : packets[24].pos + packets[24].size] = bytes(packets[24].size)

    path = write_video(tmp_path / "video.mp4", numbered_frames(60), **H264)
    found = [n for n in numbers(damaged(path, spoil), 30) if not 24 <= n < 36]
    assert len(found) > 15
    assert found == sorted(found)


@pytest.mark.parametrize("content", [b"", b"not a video " * 100])
def test_a_file_that_is_no_video_is_an_error_of_one_line(tmp_path, content):
    (tmp_path / "video.avi").write_bytes(content)
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        data.read_video(tmp_path / "video.avi", 8)


def test_what_is_not_a_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "empty").mkdir()
    for name, error in (("pipe.mp4", "no such file"), ("missing.mp4", "no such file"), ("empty", "without frames")):
        with pytest.raises((ValueError, OSError), match=error):
            data.read_video(tmp_path / name, 8)


def test_names_and_metadata_of_any_kind(tmp_path, monkeypatch):
    """A colon does not make a protocol of a name, and a title that is not UTF-8 is no reason to refuse a video."""
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "video.avi", numbered_frames(20), title="a title here")
    damaged(tmp_path / "video.avi", lambda content: content.__setitem__(
        slice(content.index(b"a title"), content.index(b"a title") + 2), b"\xe9\xff"))
    (tmp_path / "video.avi").rename("http:a #(1)%03d!&.avi")
    assert numbers("http:a #(1)%03d!&.avi", 5) == data.sample_frames(20, 5).tolist()


def test_what_is_too_large_is_refused(tmp_path, monkeypatch):
    path = write_video(tmp_path / "video.mkv", numbered_frames(100))
    Image.new("1", (100, 9)).save(tmp_path / "frame1.png")
    for bound, value, error in (("MAX_PIXELS", 700, "a frame of 32 x 24 pixels is too large"),
                                ("MAX_BYTES", 500, "over 500 bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(data, bound, value)
            with pytest.raises(ValueError, match=error):
                data.read_video(path, 8)
    monkeypatch.setattr(data, "MAX_PIXELS", 800)
    with pytest.raises(ValueError, match="a frame of 100 x 9 pixels is too large"):
        data.read_video(tmp_path, 8)


def test_pictures_that_would_fill_the_memory_are_refused(tmp_path):
    """In the header of a small file of ffv1, which takes the size from there, as a PNG and as a true video."""
    def enlarge(content):
        where = content.index(b"strf") + 8 + 4
        content[where : where + 8] = struct.pack("<ii", 30_000, 30_000)

    path = damaged(write_video(tmp_path / "video.avi", numbered_frames(10)), enlarge)
    with pytest.raises(ValueError, match="a video without frames|cannot decode"):
        data.read_video(path, 4)
    Image.new("1", (14_000, 14_000)).save(tmp_path / "frame1.png")
    with pytest.raises(ValueError, match="196000000 pixels"):
        data.read_video(tmp_path, 4)
    path = write_video(tmp_path / "large.avi", numbered_frames(1, 8200, 8200), "mjpeg", "yuvj420p")
    with pytest.raises(ValueError, match="8200 x 8200 pixels is too large"):
        data.read_video(path, 4)


@pytest.mark.parametrize("seed", range(40))
def test_random_damage_gives_frames_or_an_error_of_one_line(tmp_path, seed):
    rng = np.random.default_rng(seed)
    name, options = [("video.mp4", H264), ("video.mkv", H264), ("video.avi", {}), ("video.mov", dict(
        codec="qtrle", pix_fmt="argb"))][seed % 4]

    def spoil(content):
        for _ in range(rng.integers(1, 30)):
            content[rng.integers(len(content) if rng.integers(2) else 300)] = rng.integers(256)

    path = damaged(write_video(tmp_path / name, numbered_frames(30), **options), spoil)
    result = ""
    try:
        result = data.read_video(path, 8)
    except (ValueError, OSError) as error:
        result = str(error)
    if isinstance(result, str):
        assert re.fullmatch(r"[^\n]+", result)
    else:
        assert result.shape[:2] == (8, 3)
