"""Protocols that say what an encoder knows; importing this registers them."""

from smalti.evaluation import finetune as finetune
from smalti.evaluation import knn as knn
from smalti.evaluation import linear_probe as linear_probe
from smalti.evaluation import linear_segmentation as linear_segmentation
from smalti.evaluation import overclustering as overclustering
from smalti.evaluation import segmenter as segmenter
from smalti.evaluation import sleep_staging as sleep_staging

# isort: split
# Imports register protocols, which run and are printed in this order.
from smalti.evaluation import attention as attention
from smalti.evaluation import detection as detection
from smalti.evaluation import equivariance as equivariance
from smalti.evaluation import generation as generation
from smalti.evaluation import in_context as in_context
from smalti.evaluation import keep_curve as keep_curve
from smalti.evaluation import knn_patch as knn_patch
from smalti.evaluation import rank as rank
from smalti.evaluation import retrieval as retrieval
