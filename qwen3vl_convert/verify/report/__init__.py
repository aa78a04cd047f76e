"""A verification as one HTML file that needs nothing else, and the pictures in it, each of use by itself. Nothing here
computes: what is shown was found by the rest of `verify`.
"""

from qwen3vl_convert.verify.report.page import Occasion, html_report
from qwen3vl_convert.verify.report.pictures import kl_picture, layer_picture, stand_alone, ulp_picture

__all__ = ["Occasion", "html_report", "kl_picture", "layer_picture", "stand_alone", "ulp_picture"]
