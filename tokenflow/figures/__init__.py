"""The paper's figures and the results page."""
