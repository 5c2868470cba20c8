"""What a person gives at the page changes the reward that the resumed run learns."""

import shutil

import pytest
from starlette.testclient import TestClient

from active import HumanTeacher, teachers
from experiments.labelling.auth import Person
from experiments.labelling.server import make_app
from experiments.labelling.videos import Videos
from experiments.training.learn import learn

from ..studying import tiny

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("_short_updates", "_no_report")]

GIVEN = {
    "comparison": [],
    "other comparison": [],
    "mark": [("mark", {"query": 1, "side": 1, "first": 3, "last": 9, "good": True})],
    "ratings": [("rate", {"query": 1, "side": side, "stars": 5 - 4 * side}) for side in (0, 1)],
}


class NoVideos(Videos):
    """Nothing is drawn, and nothing stands in the way of it."""

    def start(self) -> None:
        pass

    def prefetch(self, jobs) -> None:
        pass

    async def get(self, job):
        return None


def post(run, given, last):
    """Answer the open queries as a browser does, the last as given, and post what else is."""
    app = make_app(run, NoVideos(run, ""), host="127.0.0.1", port=8765, repeat_every=0)
    cookie = app.set_cookie(Person("ann-1", "Ann")).partition(";")[0]
    here = "http://127.0.0.1:8765"
    with TestClient(app, base_url=here, headers={"cookie": cookie, "origin": here}) as ann:
        queries = ann.post("/api/next").json()["queries"]
        assert queries[0]["id"] == 1
        for path, body in given:
            assert ann.post(f"/api/{path}", json=body).status_code == 200
        while queries:
            id = queries[0]["id"]
            choice = last if id == 8 else ("left", "right")[id % 2]
            reply = ann.post("/api/answer", json={"query": id, "choice": choice, "seconds": 1.0})
            queries = reply.json()["queries"]
        assert reply.json()["answered"] == 8


def test_comparisons_marks_and_ratings_each_change_the_learned_reward(tmp_path, monkeypatch):
    def stop(seconds):
        raise KeyboardInterrupt

    def config(out):
        return tiny(out, teacher=HumanTeacher(), comparisons=8, rounds=1, steps=2048)

    with monkeypatch.context() as patch:
        patch.setattr(teachers.time, "sleep", stop)
        with pytest.raises(KeyboardInterrupt):
            learn(config(tmp_path / "waiting"), progress=False)
    models = {}
    for name in (*GIVEN, "again"):
        out = tmp_path / name
        shutil.copytree(tmp_path / "waiting", out)
        post(out, GIVEN.get(name, []), "right" if name == "other comparison" else "left")
        result = learn(config(out), resume=True, progress=False)
        assert result["comparisons"] == 8
        models[name] = (out / "model.safetensors").read_bytes()
    assert models.pop("again") == models["comparison"]
    assert len(set(models.values())) == len(GIVEN)
