"""The page pool: two prompts with one beginning, and a candidate forked and pruned."""

from stars_fast.core import PagePool, SequenceCache

# Pages are counted, and full ones can be found by the tokens they hold.
pool = PagePool(num_pages=64, page_size=4)
first = [11, 12, 13, 14, 15, 16, 17, 18, 19]
table = [pool.allocate() for _ in range(2)]
pool.publish(table, first[:8])
for page in table:
    pool.release(page)  # kept until the room is needed
shared = pool.match([11, 12, 13, 14, 99])
print(f"pages {table} hold {first[:8]}; another prompt begins with page {shared}")
pool.release(shared[0])
pool.check()

# The same with whole sequences: forks share their pages, and say which slots to write.
cache = SequenceCache(num_pages=64, page_size=4)
cache.open(0)
prompt = cache.branch([0], [100], [0], first, [len(first)])
print("slots of the prompt's keys and values:", prompt.slots[0].tolist())
cache.promote(100, len(first))
cache.seal_prompt(0)  # what follows starts on a page of its own, so forks copy nothing
candidates = cache.branch([0, 0], [1, 2], [9, 9], [21, 22, 23, 31, 32], [3, 2])
print("prefix read once, by both:", candidates.group_pages.tolist())
print("slots of the candidates:", candidates.slots.tolist())
cache.promote(2, 2)  # accepted
cache.drop(1)  # rejected
source, target, count = cache.take_copies()
print("tokens:", cache.tokens(0), "pages copied:", len(source))
cache.check()
