"""Tests of redishacks."""
