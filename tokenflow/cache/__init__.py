"""The source cache that preprocess.py builds."""
