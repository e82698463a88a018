"""The ``stem-fast`` command, a file a command, each thin over the Python API.

``app`` is what they share, ``arguments`` the options of several, ``report`` what they print. This
room imports every other; nothing imports it.
"""

from stem_fast.cli.app import app
from stem_fast.cli.cache import cache_app
from stem_fast.cli.compare import compare
from stem_fast.cli.doctor import doctor
from stem_fast.cli.evaluate import evaluate
from stem_fast.cli.fit import fit_command
from stem_fast.cli.predict import predict
from stem_fast.cli.synth import make_synthetic

for _name, _command in (
    ("fit", fit_command),
    ("evaluate", evaluate),
    ("predict", predict),
    ("compare", compare),
    ("synth", make_synthetic),
    ("doctor", doctor),
):
    app.command(_name)(_command)
app.add_typer(cache_app, name="cache")

__all__ = ["app"]
