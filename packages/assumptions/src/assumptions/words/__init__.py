"""Analysis of open-ended assumptions: words and their shares, contrast between data sets, clusters of meaning.

The unit of inference is the response: the k assumptions of one answer are one observation, and every interval here
resamples responses.
"""
