"""Precision alignment: recording runs, comparing them, and naming what differs."""
