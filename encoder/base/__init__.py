"""The words every other room uses; imports torch, numpy and yaml only."""
