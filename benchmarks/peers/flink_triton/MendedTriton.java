import java.util.Collection;
import java.util.HashSet;
import java.util.Map;
import java.util.Queue;
import java.util.Set;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.ConcurrentLinkedQueue;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.atomic.AtomicLong;
import okhttp3.ConnectionPool;
import okhttp3.OkHttpClient;
import org.apache.flink.configuration.ConfigOption;
import org.apache.flink.configuration.ConfigOptions;
import org.apache.flink.configuration.ReadableConfig;
import org.apache.flink.model.triton.TritonInferenceModelFunction;
import org.apache.flink.model.triton.TritonModelProviderFactory;
import org.apache.flink.table.catalog.ResolvedSchema;
import org.apache.flink.table.data.RowData;
import org.apache.flink.table.factories.FactoryUtil;
import org.apache.flink.table.factories.ModelProviderFactory;
import org.apache.flink.table.functions.AsyncPredictFunction;
import org.apache.flink.table.functions.FunctionContext;
import org.apache.flink.table.ml.AsyncPredictRuntimeProvider;
import org.apache.flink.table.ml.ModelProvider;
import org.apache.flink.table.types.logical.LogicalType;

/**
 * Flink's own function with two faults of its release worked around from outside, as the provider
 * {@code triton-mended}.
 *
 * <p>The release compares every column's type with null and refuses it; the subclass leaves that check out. The
 * release's function has a field that cannot be serialized; {@link Holder} is serialized in its place, and makes the
 * function where it runs. Both need the process of the job to be that of its tasks, as in an embedded Flink.
 *
 * <p>{@code client} says which OkHttpClient sends the requests: the release's; the release's without OkHttp's limit of
 * five requests a host, which no option lifts; or one with a pool as pull request 27568 of apache/flink proposes it, by
 * its defaults, as it is tuned for high traffic there, or switched off.
 */
public class MendedTriton implements ModelProviderFactory {
  private static final ConfigOption<Client> CLIENT =
      ConfigOptions.key("client").enumType(Client.class).defaultValue(Client.RELEASED);

  enum Client {
    RELEASED,
    UNLIMITED,
    POOLED,
    TUNED,
    NOT_REUSED
  }

  /** Nanoseconds of each request of this process. */
  static final Queue<Long> LATENCIES = new ConcurrentLinkedQueue<>();

  private final ModelProviderFactory released = new TritonModelProviderFactory();

  @Override
  public String factoryIdentifier() {
    return "triton-mended";
  }

  @Override
  public Set<ConfigOption<?>> requiredOptions() {
    return released.requiredOptions();
  }

  @Override
  public Set<ConfigOption<?>> optionalOptions() {
    Set<ConfigOption<?>> options = new HashSet<>(released.optionalOptions());
    options.add(CLIENT);
    return options;
  }

  @Override
  public ModelProvider createModelProvider(Context context) {
    FactoryUtil.ModelProviderFactoryHelper helper =
        FactoryUtil.createModelProviderFactoryHelper(this, context);
    helper.validate();
    return new Provider(new Holder(context, helper.getOptions()));
  }

  private static class Provider implements AsyncPredictRuntimeProvider {
    private final Holder holder;

    Provider(Holder holder) {
      this.holder = holder;
    }

    @Override
    public AsyncPredictFunction createAsyncPredictFunction(ModelProvider.Context context) {
      return holder;
    }

    @Override
    public ModelProvider copy() {
      return new Provider(holder);
    }
  }

  /** What a function is made of stays in this process; only the number under which it is found is serialized. */
  public static class Holder extends AsyncPredictFunction {
    private static final Map<Long, Parts> PARTS = new ConcurrentHashMap<>();
    private static final AtomicLong NUMBERS = new AtomicLong();

    private final long number = NUMBERS.incrementAndGet();
    private transient MendedFunction function;

    Holder(ModelProviderFactory.Context context, ReadableConfig options) {
      PARTS.put(number, new Parts(context, options));
    }

    @Override
    public void open(FunctionContext context) throws Exception {
      Parts parts = PARTS.get(number);
      function = new MendedFunction(parts.context, parts.options);
      function.open(context);
    }

    @Override
    public CompletableFuture<Collection<RowData>> asyncPredict(RowData row) {
      long begun = System.nanoTime();
      return function.asyncPredict(row).whenComplete((rows, error) -> LATENCIES.add(System.nanoTime() - begun));
    }

    @Override
    public void close() throws Exception {
      if (function != null) {
        function.close();
      }
    }
  }

  private record Parts(ModelProviderFactory.Context context, ReadableConfig options) {}

  private static class MendedFunction extends TritonInferenceModelFunction {
    private final Client client;
    private OkHttpClient released;

    MendedFunction(ModelProviderFactory.Context context, ReadableConfig options) {
      super(context, options);
      client = options.get(CLIENT);
    }

    @Override
    protected void validateSingleColumnSchema(ResolvedSchema schema, LogicalType expected, String name) {}

    @Override
    public void open(FunctionContext context) throws Exception {
      super.open(context);
      released = httpClient;
      switch (client) {
        case RELEASED -> {}
        case UNLIMITED -> admit(100);
        case POOLED -> pool(100, new ConnectionPool(20, 5, TimeUnit.MINUTES));
        case TUNED -> pool(200, new ConnectionPool(50, 10, TimeUnit.MINUTES));
        case NOT_REUSED -> pool(100, new ConnectionPool(0, 1, TimeUnit.MILLISECONDS));
      }
    }

    private void admit(int requests) {
      released.dispatcher().setMaxRequests(requests);
      released.dispatcher().setMaxRequestsPerHost(requests);
    }

    private void pool(int requests, ConnectionPool pool) {
      admit(requests);
      httpClient = released.newBuilder().connectionPool(pool).build();
    }

    @Override
    public void close() throws Exception {
      if (httpClient != released) {
        httpClient.connectionPool().evictAll();
      }
      httpClient = released;
      super.close();
    }
  }
}
