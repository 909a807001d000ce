"""The on-disk format: conversion between bytes and values, without I/O (FORMAT.md)."""
