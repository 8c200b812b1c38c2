"""Several nodes, as far as one machine can be them: ranks that are told they are each a node's first."""

from __future__ import annotations

from pathlib import Path

from runs import launch

NODES = """
import os
import sys

os.environ |= {"NODE_RANK": os.environ["RANK"], "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}

import torch
from composer import Trainer
from composer.models import ComposerClassifier
from composer.utils import dist

from clipcov_stream.checkpoints import signal_files_of_nodes

dist.initialize_dist("cpu", timeout=60)
given = dist.get_node_signal_file_name
with signal_files_of_nodes():
    names = dist.all_gather_object(dist.get_node_signal_file_name())
    assert len(set(names)) == 2 and len({name.rpartition("_")[0] for name in names}) == 1, names
    model = ComposerClassifier(torch.nn.Linear(2, 2), num_classes=2)
    Trainer(model=model, device="cpu", save_folder=sys.argv[1], autoresume=True, run_name="own")
assert dist.get_node_signal_file_name is given
"""


def test_nodes_that_share_a_folder_begin_together(tmp_path: Path) -> None:
    script = tmp_path / "nodes.py"
    script.write_text(NODES, encoding="utf-8")
    launch(2, script, str(tmp_path / "shared"))
    assert list((tmp_path / "shared").glob(".*signal*")) == []
