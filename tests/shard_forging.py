"""Shards forged on purpose: any members, any bytes, and a manifest that fits them."""

import hashlib
import io
import json
import tarfile

from worldloom.common import TokenShards, shard_name, stream_episodes

KEY = "episode-0000"
"""The episode of shard 0."""


def change_manifest(folder, change):
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def members_of(folder):
    """(name, content) of the members of shard 0."""
    with tarfile.open(folder / shard_name(0), "r:") as tar:
        return [(info.name, tar.extractfile(info).read()) for info in tar]


def mend(folder, *, spans=None):
    """Let the manifest tell the size and the hash of shard 0, and where its arrays lie."""
    content = (folder / shard_name(0)).read_bytes()

    def change(data):
        data["shards"][0].update(
            size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
        )
        for row in data["episodes"]:
            for part in ("codes", "actions") if row["shard"] == 0 and spans else ():
                place = spans.get(f"{row['key']}.{part}.npy")
                if place is not None:
                    row[f"{part}_offset"], row[f"{part}_bytes"] = place

    change_manifest(folder, change)


def forge(folder, members, *, format=tarfile.USTAR_FORMAT):
    """Write shard 0 anew of any (name or TarInfo, content), with a manifest that fits."""
    path = folder / shard_name(0)
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(path, "r:") as tar:
        mend(folder, spans={info.name: (info.offset_data, info.size) for info in tar})


def replaced(folder, changes):
    """The members of shard 0, some with another content; None leaves one out."""
    contents = dict(members_of(folder)) | changes
    return [(name, content) for name, content in contents.items() if content is not None]


def read_everything(folder):
    """Read as training does, then verify."""
    there = TokenShards(folder)
    for index in range(len(there.episodes)):
        there.codes_thw(index)
        there.slots_TA(index)
    there.verify()


def stream_everything(folder):
    """Read as from a pipe."""
    there = TokenShards(folder, tars_elsewhere=True)
    for index, file in enumerate(there.files):
        with (folder / file.file).open("rb") as tar:
            list(stream_episodes(there, index, tar, where=str(folder / file.file)))
